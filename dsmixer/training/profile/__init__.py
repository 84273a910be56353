"""Where the time of a training step goes: ``dsmixer train --profile``.

``clock`` adds up the seconds of each part, ``ranges`` says which calls belong to which part, ``backward``
finds the part of each node of the backward pass, ``steps`` chooses the steps and makes the figures.
"""
