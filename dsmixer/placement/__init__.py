"""Where experts live: the plan, the engine internals it needs, and how tokens or weights reach each other."""
