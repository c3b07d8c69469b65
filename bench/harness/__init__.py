"""The machinery: cases, contenders, clocks, turns, records and tables on the console."""
