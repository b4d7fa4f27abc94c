"""What every section of the configuration shares: unknown keys are errors, every field carries its own explanation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Schedule = Literal["linear", "cosine", "constant"]
Path = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A block of settings. Frozen: a configuration is changed by making another one."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python's True is an int; `epochs: yes` must not train for one epoch.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected another type than true/false")
        return value


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field with its one default, its explanation (printed by `tercet init`) and its bounds."""
    return Field(default, description=description, **bounds)
