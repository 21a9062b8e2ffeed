"""Refuse what no rule makes."""


localrules:
    unmade,


rule unmade:
    """Say which names are known; no job of it ever exists."""
    input:
        unmade,
    output:
        "{unmade}",
    wildcard_constraints:
        unmade=layout.unmade(),
