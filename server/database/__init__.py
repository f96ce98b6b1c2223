"""The registry's database: SQLite in the data folder, or PostgreSQL by URL."""
