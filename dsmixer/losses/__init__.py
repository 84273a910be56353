"""What training minimises: the task, the routing losses, and the pull towards the experts' first values."""
