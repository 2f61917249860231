"""Every limit on what is taken from outside, in one place: what is larger is refused with a message that names it."""

# Height × width beyond which an image is refused before its pixels are decoded: room for a camera's 108 megapixels,
# and at most 0.5 GB for each image being decoded.
MAX_PIXELS = 128 * 1024**2

MAX_MANIFEST_BYTES = 64 << 20
"""Of `index.json` and of its older versions."""

MAX_METADATA_CSV_BYTES = 256 << 20
"""Of a table of metadata beside a folder of images."""

MAX_MEMBER_BYTES = 512 << 20
"""Of one file in a tar shard: room for an image of MAX_PIXELS, hardly compressed."""

MAX_WHERE_CHARACTERS = 100_000
"""Of a filter: room for a list of some thousand ids."""

# Each may nest one level deeper, and an expression 1,000 levels deep overflows the stack of Lance's parser.
MAX_WHERE_WORDS = 500
"""Words and operators of a filter, without its literals in quotes and the members of its lists."""
