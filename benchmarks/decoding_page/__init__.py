"""The sections of docs/benchmarks.md, each made from a record: a file a kind of measurement."""
