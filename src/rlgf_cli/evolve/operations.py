"""Operations: prompts that ask a guide for a rewrite of an instruction, read from YAML."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from rlgf_cli.config.loader import resolve
from rlgf_cli.section import Strict

PLACEHOLDER = "{instruction}"
BUILTIN = Path(__file__).with_name("operations.yaml")


class Operation(Strict):
    """A kind of rewrite. ``prompt`` is the guide's prompt, with ``{instruction}`` in it; ``breadth``: the result is a
    new instruction, not a harder form of the given one.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    prompt: str
    breadth: bool = False

    @model_validator(mode="after")
    def _check(self) -> Operation:
        if PLACEHOLDER not in self.prompt:
            raise ValueError(f"the prompt of {self.name!r} must hold {PLACEHOLDER}")
        return self

    def prompt_for(self, instruction: str) -> str:
        """The guide's prompt for a rewrite of ``instruction``."""
        return self.prompt.replace(PLACEHOLDER, instruction)


class OperationFile(Strict):
    """The model of a file of operations, such as ``operations.yaml``."""

    operations: list[Operation] = Field(min_length=2)

    @field_validator("operations")
    @classmethod
    def _each_once(cls, operations: list[Operation]) -> list[Operation]:
        names = [operation.name for operation in operations]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the operation {twice[0]!r} is there twice")
        return operations


def read_operations(path: str | None) -> list[Operation]:
    """The operations of a file, or the six built-in ones. Raises UserError with the line of an error."""
    return resolve(OperationFile, files=[Path(path) if path else BUILTIN]).config.operations
