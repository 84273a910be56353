"""From the user's files to micro-batches: records, domains, tokens, packed rows, the order of the steps."""
