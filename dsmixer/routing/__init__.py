"""Which experts speak for a token: routers, the ways to choose, and what is counted while they do."""
