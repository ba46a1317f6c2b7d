"""Pretrained models that run on the client, for methods that declare `uses_local`."""
