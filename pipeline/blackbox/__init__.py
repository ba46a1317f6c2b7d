"""The door: model, endpoint, replicas, the client that methods see, and the ledger that counts."""
