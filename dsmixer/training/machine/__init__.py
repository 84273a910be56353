"""What this machine has and what it lacks for a run: the checks of ``dsmixer doctor``.

Nothing here imports torch in this process: what could fail to import, crash or hang is tried in a child.
"""
