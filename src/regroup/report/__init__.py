"""One page made from records: what was converted, what it cost, what it gained."""
