"""The ledger: a durable record of every charge, with accounts, reservations and an audit."""
