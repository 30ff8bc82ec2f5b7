"""Evolution of instructions (TeaMs-RL): a policy chooses the operation, a guide rewrites, new rewrites are kept.

Gu, Knoll and Jin, "TeaMs-RL: Teaching LLMs to Generate Better Instruction Datasets via Reinforcement Learning",
arXiv 2403.08694. A chain begins with a seed instruction; each step asks the guide for a rewrite by one operation
(:mod:`.environment`). A rewrite that breaks no rule (:mod:`.rules`) and is new (:mod:`.novelty`) is the chain's
instruction from then on.
"""
