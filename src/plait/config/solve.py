"""What the weights of a mixture are solved from: limits on its tokens, shares and epochs.

Every range is ``[least, most]``. What contradicts itself whatever the data are is refused here; what the
counted tokens cannot give is refused by `plait analyse`.
"""

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from plait.config.base import Name, Share, Strict

ROUNDING = 1e-9
"""By how much sums of shares may miss 1: they are typed as decimals."""


class Part(Strict):
    """A dataset of a solved mixture; each range is its least and its most."""

    share: tuple[Share, Share] = Field((0, 1), description="its share of the tokens that are read")
    epochs: tuple[NonNegativeFloat, NonNegativeFloat | None] = Field(
        (0, None), description="how often an epoch of the mixture reads it; null: no limit"
    )
    language: str | None = Field(
        None,
        min_length=1,
        description="the language that all its tokens count for in `languages`, as you name it; null: none, "
        "as for a dataset of several",
    )


class Solve(Strict):
    """Limits that the weights of a mixture are solved from; each range is its least and its most."""

    tokens: tuple[PositiveInt, PositiveInt] = Field(
        description="tokens that an epoch of the mixture reads, as many as the other limits allow; equal "
        "numbers: exactly so many"
    )
    datasets: dict[Name, Part] = Field(min_length=1, description="the datasets, each with its limits")
    picture_to_text: tuple[NonNegativeFloat, NonNegativeFloat | None] = Field(
        (0, None), description="tokens of pictures over tokens of text; null: no limit"
    )
    languages: dict[str, Share] = Field(
        {}, description="by language, the least share of the tokens that its datasets have together"
    )
    whole_shards: bool = Field(
        False,
        description="whether each shard is read a whole number of times, 0 among them; those of a dataset "
        "k or k + 1 times (packed sequences)",
    )

    @model_validator(mode="after")
    def _ranges_are_not_empty(self) -> Self:
        ranges = {"tokens": self.tokens, "picture_to_text": self.picture_to_text}
        for name, part in self.datasets.items():
            ranges |= {f"datasets.{name}.share": part.share, f"datasets.{name}.epochs": part.epochs}
        for key, (least, most) in ranges.items():
            if most is not None and least > most:
                raise ValueError(f"{key} is [{least:g}, {most:g}]; write the least first, then the most")
        if self.whole_shards and self.tokens[0] == self.tokens[1]:
            raise ValueError(
                f"`whole_shards` and tokens of exactly {self.tokens[0]}: whole shards hardly ever add up to "
                "one number; give a range, e.g. "
                f"[{self.tokens[0] * 95 // 100 or 1}, {self.tokens[1]}]"
            )
        return self

    @model_validator(mode="after")
    def _shares_can_sum_to_one(self) -> Self:
        for which, sign, wrong in ((0, 1, "more"), (1, -1, "less")):
            total = sum(part.share[which] for part in self.datasets.values())
            if sign * (total - 1) > ROUNDING:
                raise ValueError(
                    f"the {('least', 'most')[which]} shares of the datasets sum to {total:g}, {wrong} than "
                    f"1; {('lower', 'raise')[which]} some of {', '.join(self.datasets)}"
                )
        if sum(self.languages.values()) > 1 + ROUNDING:
            raise ValueError(
                f"languages ask for {sum(self.languages.values()):g} of the tokens together, more than 1; "
                f"lower some of {', '.join(self.languages)}"
            )
        return self

    @model_validator(mode="after")
    def _languages_are_spoken(self) -> Self:
        spoken = {part.language for part in self.datasets.values()} - {None}
        for language, share in self.languages.items():
            parts = [part for part in self.datasets.values() if part.language == language]
            if not parts:
                raise ValueError(
                    f"languages.{language} wants a share of {share:g}, and no dataset has `language: "
                    f"{language}`; name it at its datasets"
                )
            most = sum(part.share[1] for part in parts)
            if share > most + ROUNDING:
                raise ValueError(
                    f"languages.{language} wants a share of {share:g}, and its datasets may have {most:g} "
                    "together; raise the most of their shares"
                )
        unread = sorted(map(str, spoken - self.languages.keys()))
        if unread:
            raise ValueError(
                f"a dataset has `language: {unread[0]}`, which nothing reads; give {unread[0]} a least "
                "share in `languages`, or leave it out"
            )
        return self
