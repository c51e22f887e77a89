"""The controller's database: base class, transactions, migrations."""
