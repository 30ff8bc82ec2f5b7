"""Instructions that evolve: a policy chooses the operation, a guide rewrites, what is new is kept (TeaMs-RL).

Gu, Knoll and Jin, "TeaMs-RL: Teaching LLMs to Generate Better Instruction Datasets via Reinforcement Learning",
arXiv 2403.08694. A chain begins with a seed instruction; each step asks the guide for a rewrite by one operation
(:mod:`.environment`), and what breaks no rule (:mod:`.rules`) and is new (:mod:`.novelty`) goes on.
"""
