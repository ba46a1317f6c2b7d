"""What `farebox bench` runs: one module for each bench, `harness` beneath them, `reference` as the slow side."""
