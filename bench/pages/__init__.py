"""The pages that `bench.report` makes from records: tables, plots, and where ours is not ahead."""
