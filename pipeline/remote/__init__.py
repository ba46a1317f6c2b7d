"""A model that answers over HTTP: the client, its records and its physical bill."""
