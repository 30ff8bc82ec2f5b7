"""The ``algorithm`` section of a config: the class of an algorithm's name, and the checks before one is made."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_serializer, model_validator
from pydantic.fields import FieldInfo

from rlgf_cli.algorithms.parameters import ALL
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.section import Refused, Strict


class Algorithm(Strict):
    """A name from the catalogue with its parameters, or a mixture of one's own: ``regimes`` and ``schedule``."""

    scalar_key: ClassVar[str | None] = "name"
    named: ClassVar[dict[str, type[Algorithm]]] = {}
    """The class of each name, in the order of ``rlgf ls algorithms``."""
    name: str = "ppo"

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        if "regimes" not in cls.model_fields:
            Algorithm.named[cls.model_fields["name"].default] = cls

    @classmethod
    def summary(cls) -> str:
        """The line of ``rlgf ls algorithms``."""
        return " ".join((cls.__doc__ or "").split("\n\n")[0].split())

    @classmethod
    def section_fields(cls) -> dict[str, FieldInfo]:
        """The fields of the class; of :class:`Algorithm` itself, those of every algorithm."""
        if cls is not Algorithm:
            return cls.model_fields
        fields: dict[str, FieldInfo] = dict(cls.model_fields)
        sections: list[type[Strict]] = [*ALL, *cls.named.values(), Mixture]
        for section in sections:
            fields |= {key: field for key, field in section.model_fields.items() if key not in fields}
        return fields

    @abstractmethod
    def spec(self) -> AlgorithmSpec:
        """The algorithm as data. Raises ValidationError for a refused combination."""

    def always(self, regime: Regime) -> AlgorithmSpec:
        """An algorithm with one regime for all iterations."""
        return AlgorithmSpec(name=self.name, regimes=(regime,))

    def of(self, *parts: type[BaseModel]) -> dict[str, Any]:
        """The values of the fields that the classes ``parts`` declare, as keyword arguments of a Regime."""
        return {key: getattr(self, key) for part in parts for key in part.model_fields}

    @model_validator(mode="wrap")
    @classmethod
    def _by_name(cls, values: Any, handler: ModelWrapValidatorHandler[Algorithm]) -> Algorithm:
        """A null counts as not given: configs of older runs hold every algorithm's parameters, the others' as null."""
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if value is not None}
            name = values.get("name", "ppo")
            if cls is Algorithm:
                return (
                    _kind_of(name, values).model_validate(values) if isinstance(name, str) else handler({"name": name})
                )
        algorithm = handler(values)
        try:
            algorithm.spec()
        except ValidationError as error:
            raise Refused(f"algorithm {algorithm.name!r}: {_first_reason(error)}", None) from None
        return algorithm

    @model_serializer(mode="plain")
    def _as_dict(self) -> dict[str, Any]:
        """Every algorithm's keys, null where no value was given: files of runs keep the same keys for all of them."""
        given = {key: getattr(self, key) for key in self.model_fields_set}
        return {key: given.get(key) for key in Algorithm.section_fields()} | {"name": self.name}


class Mixture(Algorithm):
    """An algorithm of one's own."""

    regimes: list[dict[str, Any]]
    schedule: dict[str, Any] = Field(default_factory=dict)

    def spec(self) -> AlgorithmSpec:
        return AlgorithmSpec.model_validate({"name": self.name, "regimes": self.regimes, "schedule": self.schedule})


def parameters_of(name: str) -> list[str]:
    """The parameters of the named algorithm. Raises UserError for an unknown name."""
    if name not in Algorithm.named:
        raise UserError(f"unknown algorithm {name!r}", hint=did_you_mean(name, Algorithm.named))
    return [key for key in Algorithm.named[name].model_fields if key != "name"]


def _kind_of(name: str, given: Iterable[str]) -> type[Algorithm]:
    """The class for a section with these keys. Refuses parameters that belong to another class."""
    if "regimes" in given:
        if foreign := [key for key in given if key in Algorithm.section_fields() and key not in Mixture.model_fields]:
            raise ValueError(f"{', '.join(foreign)}: with regimes of your own, parameters go into the regimes")
        return Mixture
    if "schedule" in given:
        raise ValueError("schedule goes with regimes of your own; named algorithms bring theirs")
    try:
        taken = parameters_of(name)
    except UserError as error:
        raise Refused(error.message, error.hint) from None
    for key in given:
        if key in Algorithm.section_fields() and key not in ("name", *taken):
            hint = f"{name} takes {', '.join(taken) or 'no parameters'}"
            raise Refused(f"the algorithm {name!r} has no parameter {key!r}", hint)
    return Algorithm.named[name]


def _first_reason(error: ValidationError) -> str:
    """The first message of a pydantic error, without its framing."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
