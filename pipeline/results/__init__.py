"""Result rows, and what is computed from them: leaderboard, tables, plots, HTML page, MLflow records."""
