"""SQLite and PostgreSQL, by Tortoise ORM."""
