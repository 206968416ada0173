"""How the tables came to their form; run by Alembic."""
