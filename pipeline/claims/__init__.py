"""What the seed papers claim beyond a table of accuracies, measured here: `farebox claims` (docs/claims.md)."""
