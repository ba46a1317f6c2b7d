"""Sweeps: reserve budgets, run trials on Ray, report progress and status, guard the storage folder."""
