"""Where a job's run stands with what runs it, such as Slurm's queue."""

import sqlalchemy as sa
from alembic import op

revision = "0003_runner_state"
down_revision = "0002_pages"


def upgrade() -> None:
    """Go to this form."""
    op.add_column("jobs", sa.Column("runner_state", sa.JSON(none_as_null=True), nullable=True))
