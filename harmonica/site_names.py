"""Site names: one site is called differently by different code.

    the original DiT, this library    blocks.3.attn                 blocks.3.mlp
    diffusers                         transformer_blocks.3.attn1    transformer_blocks.3.ff
    SmoothCache                       attn-3                        mlp-3
    a table for kinds of site         attn                          mlp

`harmonica.models.sites` also reads a module's name, to tell whether the module is a site. This file
does not know schedules or models.
"""

import re

_ORIGINAL = {"attn1": "attn", "attention": "attn", "self_attn": "attn", "cross_attn": "attn2"}
_ORIGINAL |= {"ff": "mlp", "ffn": "mlp", "feed_forward": "mlp"}
KINDS = {*_ORIGINAL, "attn", "attn2", "mlp"}
"""What a kind of site may be called."""

_NUMBERED = re.compile(r"(?:transformer_)?blocks\.([0-9]{1,6})\.(\w+)|(.+)-([0-9]{1,6})")


def word_of(name: str) -> str:
    """Return the last part of a site's name, in the original's word if it has one.

    >>> word_of("transformer_blocks.3.attn1"), word_of("ff"), word_of("x.conv")
    ('attn', 'mlp', 'conv')
    """
    word = name.rpartition(".")[2]
    return _ORIGINAL.get(word, word)


def block_and_word(name: str) -> tuple[int, str] | None:
    """Return the number of the block and the word of a site in the one list of blocks, else None.

    >>> block_and_word("transformer_blocks.3.ff"), block_and_word("attn-3")
    ((3, 'mlp'), (3, 'attn'))
    """
    match = _NUMBERED.fullmatch(name)
    return match and (int(match[1] or match[4]), word_of(match[2] or match[3]))
