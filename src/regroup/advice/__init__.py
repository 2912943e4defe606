"""How many KV heads: what each number costs in memory, time and quality, before anything is converted."""
