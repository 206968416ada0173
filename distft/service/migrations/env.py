"""What Alembic runs: the migrations, on the connection that `distft.service.database` opened."""

from alembic import context

from distft.service.tables import ServiceTable

context.configure(connection=context.config.attributes["connection"], target_metadata=ServiceTable.metadata)
with context.begin_transaction():
    context.run_migrations()
