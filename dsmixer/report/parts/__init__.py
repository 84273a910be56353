"""The parts of the page, a file each. One that has nothing to say is empty."""
