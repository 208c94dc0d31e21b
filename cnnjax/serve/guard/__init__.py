"""Who may ask a server for what: keys, tokens, roles, rates, sizes, and a record of it all."""
