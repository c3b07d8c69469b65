"""What `bench.report` makes from records: tables, plots, and where ours is not ahead."""
