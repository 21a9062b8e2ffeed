"""What the types of config/ share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from plait.layout import WILDCARDS

Name = Annotated[str, StringConstraints(pattern=f"^{WILDCARDS['run']}$")]
FormatName = Annotated[str, StringConstraints(pattern=f"^{WILDCARDS['format']}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Frozen, and no key that nothing reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
