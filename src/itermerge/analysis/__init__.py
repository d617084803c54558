"""What a round did to a model: where its weights changed (`change`), which layers its reasoning needs (`importance`),
how the two go together (`mismatch`), and how alike its samples have become (`diversity`). Definitions: arXiv ids there.
"""

ESTIMATORS = ("skip", "taylor", "block_influence", "angular")  # of layer importance
