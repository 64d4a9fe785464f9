"""SQL, the only truth: `jobs` moves states, `batches`, `sessions` and `reads` do what they say."""
