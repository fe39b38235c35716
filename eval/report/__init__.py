"""What a run's records say: figures with intervals, tables, one page, and several runs as a leaderboard."""
