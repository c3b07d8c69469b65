"""The machinery: cases, contenders, meters, turns, records and tables on the console."""
