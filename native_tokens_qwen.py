"""Text to ids by a library of our own, in half of tiktoken's time, for those who encode much: `NativeTokens`.

It gives the ids of tiktoken with this model's pattern, or none at all: text with a character of whose kind versions of
Unicode may think differently, or with a piece of more than `LONGEST` bytes, is left to tiktoken.
"""

from __future__ import annotations

import ctypes
import functools
import re
import unicodedata
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress

import numpy as np

from .pieces_qwen import BLANKS
from .translating_qwen import Source, library_of

TOKENS = Source(
    "tokens",
    "QWen's tokenizer",
    r"""
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first bytes of a token are the low ones of a number");

namespace {

const uint32_t NONE = 0xffffffffu;

// The first 8 bytes of a token, of a shorter one all and zeros. Behind every text and token 8 bytes can be read.
inline uint64_t head_of(const uint8_t *place, size_t length) {
    uint64_t head;
    std::memcpy(&head, place, 8);
    return length >= 8 ? head : head & ((1ull << (8 * length)) - 1);
}

// Tokens by their bytes. A place has the first 8 bytes of its token, so most take one look into memory. Most of what
// is no token is found out by `seen`, bits that the processor's nearer caches hold.
class Table {
    struct Place { uint64_t head; uint32_t length, id; };
    std::vector<Place> places;
    std::vector<size_t> starts;  // of each place's token in `bytes`
    std::vector<uint8_t> bytes;
    std::vector<uint64_t> seen = std::vector<uint64_t>(1 << 15);
    uint64_t mask;

    uint64_t &word_of(uint64_t code) { return seen[code >> 38 & 0x7fff]; }
    bool is_seen(uint64_t code) const { return seen[code >> 38 & 0x7fff] >> (code >> 32 & 63) & 1; }

    static uint64_t hash(const uint8_t *token, size_t length, uint64_t head) {
        const uint64_t odd = 0xd6e8feb86659fd93ull;
        uint64_t value = (head ^ (length * 0x9e3779b97f4a7c15ull)) * odd;
        for (size_t n = 8; n < length; n += 8) value = (value ^ (value >> 32) ^ head_of(token + n, length - n)) * odd;
        return value ^ (value >> 32);
    }

  public:
    Table(const uint8_t *tokens, const int64_t *lengths, const uint32_t *ids, int64_t count) {
        size_t size = 1024, total = 0;
        while (2 * size < 3 * (size_t)count) size *= 2;
        for (int64_t n = 0; n < count; n++) total += lengths[n];
        places.assign(size, Place{0, 0, 0});
        starts.assign(size, 0);
        bytes.assign(tokens, tokens + total);
        bytes.resize(total + 8);
        mask = size - 1;
        size_t start = 0;
        for (int64_t n = 0; n < count; start += lengths[n++]) {
            const uint8_t *token = bytes.data() + start;
            const uint64_t head = head_of(token, lengths[n]), code = hash(token, lengths[n], head);
            word_of(code) |= 1ull << (code >> 32 & 63);
            size_t at = code & mask;
            while (places[at].length) at = (at + 1) & mask;
            places[at] = Place{head, (uint32_t)lengths[n], ids[n]};
            starts[at] = start;
        }
    }

    uint32_t find(const uint8_t *token, size_t length) const {
        const uint64_t head = head_of(token, length), code = hash(token, length, head);
        if (!is_seen(code)) return NONE;
        for (size_t at = code & mask;; at = (at + 1) & mask) {
            const Place &place = places[at];
            if (!place.length) return NONE;
            if (place.head == head && place.length == length &&
                (length <= 8 || !std::memcmp(bytes.data() + starts[at], token, length)))
                return place.id;
        }
    }
};

// Kinds of characters that the pattern tells apart.
enum Kind : uint8_t { OTHER, LETTER, NUMBER, SPACE, LINE, UNKNOWN };
const uint32_t KNOWN = 0x20000;  // characters that the table of kinds has

inline int width(const uint8_t *place) { return *place < 0x80 ? 1 : *place < 0xe0 ? 2 : *place < 0xf0 ? 3 : 4; }
inline uint32_t character(const uint8_t *p) {
    switch (width(p)) {
        case 1: return p[0];
        case 2: return (p[0] & 31) << 6 | (p[1] & 63);
        case 3: return (p[0] & 15) << 12 | (p[1] & 63) << 6 | (p[2] & 63);
        default: return (p[0] & 7) << 18 | (p[1] & 63) << 12 | (p[2] & 63) << 6 | (p[3] & 63);
    }
}

const size_t LONGEST = 4096, WIDE = 16;  // bytes of a piece, numbers of a vector

struct Vocabulary {
    Table words, specials;
    std::vector<uint8_t> kinds;
    std::vector<uint32_t> pairs;  // by two bytes: the token that they are

    Kind kind(const uint8_t *place) const {
        const uint32_t code = character(place);
        return code < KNOWN ? (Kind)kinds[code] : UNKNOWN;
    }
    // Behind all characters of one kind from a place on.
    const uint8_t *behind(const uint8_t *place, const uint8_t *end, Kind wanted) const {
        while (place < end && kind(place) == wanted) place += width(place);
        return place;
    }
};

typedef uint32_t vec __attribute__((vector_size(4 * WIDE)));
typedef uint32_t half __attribute__((vector_size(2 * WIDE)));
typedef uint32_t quarter __attribute__((vector_size(WIDE)));

inline uint32_t lowest(vec values) {
    half halves[2];
    std::memcpy(halves, &values, sizeof halves);
    const half half_of = halves[0] < halves[1] ? halves[0] : halves[1];
    quarter quarters[2];
    std::memcpy(quarters, &half_of, sizeof quarters);
    const quarter rest = quarters[0] < quarters[1] ? quarters[0] : quarters[1];
    return std::min(std::min(rest[0], rest[1]), std::min(rest[2], rest[3]));
}
inline uint32_t lowest(const uint32_t *ranks) {
    vec values;
    std::memcpy(&values, ranks, sizeof values);
    return lowest(values);
}

// A piece that is no token: of its neighbours the two of the lowest rank are joined, again and again, the first of
// several. One of up to 16 V bytes is held in registers: a part by the place where it begins, a bit of `parts`, and it
// with its neighbour by a key, which has the rank of the two and behind that the place.
template <int V> uint32_t *join(const Vocabulary &known, const uint8_t *piece, size_t length, uint32_t *ids) {
    static_assert(V * WIDE <= 64, "there are as many places as bits");
    vec keys[V], places[V];
    auto key_of = [](size_t place, uint32_t rank) { return rank == NONE ? NONE : rank << 6 | (uint32_t)place; };
    for (size_t n = 0; n < V * WIDE; n++) {
        places[n / WIDE][n % WIDE] = n;
        keys[n / WIDE][n % WIDE] = key_of(n, n + 1 < length ? known.pairs[piece[n] << 8 | piece[n + 1]] : NONE);
    }
    auto set = [&](size_t place, uint32_t rank) {
        const vec key = vec{} + key_of(place, rank);
        for (int v = 0; v < V; v++) keys[v] = places[v] == (uint32_t)place ? key : keys[v];
    };
    auto first = [&](uint64_t parts) -> size_t { return parts ? __builtin_ctzll(parts) : length; };
    auto rank = [&](size_t place, size_t end) { return known.words.find(piece + place, end - place); };
    uint64_t parts = ~0ull >> (64 - length);
    for (;;) {
        vec least = keys[0];
        for (int v = 1; v < V; v++) least = keys[v] < least ? keys[v] : least;
        const uint32_t key = lowest(least);
        if (key == NONE) break;
        const size_t place = key & 63;
        const uint64_t others = parts & (~1ull << place), later = others & (others - 1);
        const uint64_t earlier = parts & ((1ull << place) - 1);
        parts = earlier | 1ull << place | later;
        set(first(others), NONE);
        set(place, later ? rank(place, first(later & (later - 1))) : NONE);
        if (!earlier) continue;
        const size_t before = 63 - __builtin_clzll(earlier);
        set(before, rank(before, first(later)));
    }
    for (; parts; parts &= parts - 1) {
        const size_t place = first(parts);
        *ids++ = rank(place, first(parts & (parts - 1)));
    }
    return ids;
}

// The same for longer pieces. Of each 16 places the lowest rank is kept, so that few are looked at anew.
uint32_t *join_long(const Vocabulary &known, const uint8_t *piece, size_t length, uint32_t *ids) {
    uint32_t ranks[LONGEST], least[LONGEST / WIDE + WIDE];  // of a part and its neighbour, where the part begins
    uint16_t next[LONGEST + 1], before[LONGEST + 1];
    const size_t blocks = (length + WIDE - 1) / WIDE, all = (blocks + WIDE - 1) / WIDE * WIDE;
    auto note = [&](size_t place) { least[place / WIDE] = lowest(ranks + place / WIDE * WIDE); };
    for (size_t n = 0; n < blocks * WIDE; n++)
        ranks[n] = n + 1 < length ? known.pairs[piece[n] << 8 | piece[n + 1]] : NONE;
    for (size_t n = 0; n <= length; n++) next[n] = n + 1, before[n] = n - 1;
    for (size_t n = 0; n < all; n++) least[n] = n < blocks ? lowest(ranks + n * WIDE) : NONE;
    for (;;) {
        uint32_t rank = NONE;
        for (size_t n = 0; n < all; n += WIDE) rank = std::min(rank, lowest(least + n));
        if (rank == NONE) break;
        const size_t block = std::find(least, least + all, rank) - least;
        const size_t place = std::find(ranks + block * WIDE, ranks + length, rank) - ranks;
        const size_t gone = next[place], behind = next[gone];
        next[place] = behind;
        before[behind] = place;
        ranks[gone] = NONE;
        ranks[place] = behind < length ? known.words.find(piece + place, next[behind] - place) : NONE;
        note(gone);
        note(place);
        if (!place) continue;
        const size_t first = before[place];
        ranks[first] = known.words.find(piece + first, behind - first);
        note(first);
    }
    for (size_t n = 0; n < length; n = next[n]) *ids++ = known.words.find(piece + n, next[n] - n);
    return ids;
}

uint32_t *joined(const Vocabulary &known, const uint8_t *piece, size_t length, uint32_t *ids) {
    const auto join_piece = length <= 16 ? join<1> : length <= 32 ? join<2> : length <= 64 ? join<4> : join_long;
    return join_piece(known, piece, length, ids);
}

// Bytes of 's, 't, 're, 've, 'm, 'll or 'd at a place, 0 of something else.
inline size_t contraction(const uint8_t *place, const uint8_t *end) {
    if (end - place < 2) return 0;
    const uint8_t first = place[1] | 32, second = end - place > 2 ? place[2] | 32 : 0;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    return ((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l') ? 3 : 0;
}

// White space: up to its last line break, else all of it at the end of the text, else without its last character.
inline const uint8_t *blanks(const Vocabulary &known, const uint8_t *place, const uint8_t *end) {
    const uint8_t *line = nullptr, *last = place, *at = place;
    for (Kind kind; at < end && ((kind = known.kind(at)) == SPACE || kind == LINE);) {
        last = at;
        at += width(at);
        if (kind == LINE) line = at;
    }
    return line ? line : at == end || last == place ? at : last;
}

// The end of the piece that begins at a place, by the alternatives of `PAT_STR` in their order.
inline const uint8_t *piece(const Vocabulary &known, const uint8_t *place, const uint8_t *end) {
    const Kind kind = known.kind(place);
    if (*place == '\'')
        if (const size_t length = contraction(place, end)) return place + length;
    if (kind == NUMBER) return place + width(place);
    if (kind != LINE) {
        const uint8_t *letters = kind == LETTER ? place : place + width(place);
        if (letters < end && known.kind(letters) == LETTER) return known.behind(letters, end, LETTER);
    }
    const uint8_t *marks = *place == ' ' ? place + 1 : place;
    if (marks < end && known.kind(marks) == OTHER) {
        marks = known.behind(marks, end, OTHER);
        while (marks < end && (*marks == '\r' || *marks == '\n')) marks++;
        return marks;
    }
    return blanks(known, place, end);
}

// The next special token that is allowed, or the end of the text; all have the form <|...|>.
struct Special { const uint8_t *start, *end; uint32_t id; };
Special next_special(const Vocabulary &known, const uint8_t *place, const uint8_t *end, const uint8_t *allowed,
                     const uint32_t *ids) {
    for (; (place = (const uint8_t *)std::memchr(place, '<', end - place)); place++) {
        if (end - place < 4 || place[1] != '|') continue;
        const uint8_t *close = place + 2;
        while (end - close >= 2 && close - place < 64 && !(close[0] == '|' && close[1] == '>')) close++;
        if (end - close < 2) continue;
        const uint32_t number = known.specials.find(place, close + 2 - place);
        if (number != NONE && allowed[number]) return Special{place, close + 2, ids[number]};
    }
    return Special{end, end, NONE};
}

}  // namespace

extern "C" {

// Tokens and special tokens: their bytes one after another, lengths in bytes, ids (of a special token its number) and
// how many there are; kinds of the first 2^17 characters. Null where there is no room.
void *tokens_new(const uint8_t *words, const int64_t *lengths, const uint32_t *ids, int64_t count,
                 const uint8_t *specials, const int64_t *special_lengths, const uint32_t *numbers,
                 int64_t special_count, const uint8_t *kinds) {
    try {
        auto *made = new Vocabulary{Table(words, lengths, ids, count),
                                    Table(specials, special_lengths, numbers, special_count),
                                    std::vector<uint8_t>(kinds, kinds + KNOWN), std::vector<uint32_t>(65536)};
        for (int first = 0; first < 256; first++)
            for (int second = 0; second < 256; second++) {
                const uint8_t pair[10] = {(uint8_t)first, (uint8_t)second};
                made->pairs[first << 8 | second] = made->words.find(pair, 2);
            }
        return made;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

void tokens_free(void *known) { delete (Vocabulary *)known; }

// Ids of a text in UTF-8 of `size` bytes, with 8 more behind; there is place for `size` ids. `allowed` tells by number
// which special tokens are recognised, `special_ids` their ids. How many ids there are; -1: tiktoken is to do it.
int64_t tokens_encode(const void *handle, const uint8_t *text, int64_t size, const uint8_t *allowed,
                      const uint32_t *special_ids, uint32_t *ids) {
    const Vocabulary &known = *(const Vocabulary *)handle;
    const uint8_t *place = text, *end = text + size;
    uint32_t *out = ids;
    while (place < end) {
        const Special special = next_special(known, place, end, allowed, special_ids);
        for (const uint8_t *behind; place < special.start; place = behind) {
            behind = piece(known, place, special.start);
            // An unknown character is never part of a piece, so one begins with it or ends before it.
            if (known.kind(place) == UNKNOWN || (behind < special.start && known.kind(behind) == UNKNOWN)) return -1;
            const size_t length = behind - place;
            const uint32_t id = known.words.find(place, length);
            if (id != NONE) *out++ = id;
            else if (length > LONGEST) return -1;
            else out = joined(known, place, length, out);
        }
        if (special.id != NONE) *out++ = special.id;
        place = special.end;
    }
    return out - ids;
}
}
""",
)
PAYS = 2_000_000
"""Characters after which the library is asked for: making a vocabulary takes the time that it saves on as many."""

_PADDING = bytes(8)
_KNOWN = 0x20000  # as in the text above, and so are the kinds
_OTHER, _LETTER, _NUMBER, _SPACE, _LINE, _UNKNOWN = range(6)


class NativeTokens:
    """The library's work for one vocabulary, begun once as much text has come as pays for it. Copies begin anew."""

    def __init__(self) -> None:
        self._seen = 0  # characters
        self._is_known = False
        self._vocabulary: NativeVocabulary | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def vocabulary(
        self, characters: int, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]
    ) -> NativeVocabulary | None:
        """What encodes the next so many characters; None where there is no library or none yet, or it doesn't pay."""
        self._seen += characters
        if self._seen < PAYS or (library := library_of(TOKENS)) is None:
            return None
        if not self._is_known:
            self._is_known = True
            if _can_be_told(ranks, special_tokens):
                with suppress(MemoryError):
                    self._vocabulary = NativeVocabulary(library, ranks, special_tokens)
        return self._vocabulary


class NativeVocabulary:
    """A vocabulary as the library reads it. Any number of threads may use it at once.

    Args:
        library: made of `TOKENS`.
        ranks: token bytes -> id, every byte among them.
        special_tokens: token -> id, each of the form <|...|>.

    Raises:
        MemoryError: there is no room for it.
    """

    def __init__(self, library: ctypes.CDLL, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]):
        self._special_tokens = list(special_tokens)
        self._special_ids = np.fromiter(special_tokens.values(), np.uint32)
        # Ids as objects of Python, made once: as many new ones as a text has tokens take longer than the text.
        self._ids = np.array(range(1 + max(*ranks.values(), *special_tokens.values())), dtype=object)
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        self._encode = library.tokens_encode
        self._encode.argtypes = [pointer, text, ctypes.c_int64, text, pointer, pointer]
        self._encode.restype = ctypes.c_int64
        library.tokens_new.restype, library.tokens_free.argtypes = pointer, [pointer]
        specials = {token.encode(): number for number, token in enumerate(special_tokens)}
        self._handle = ctypes.c_void_p(library.tokens_new(*_columns(ranks), *_columns(specials), _kinds()))
        if not self._handle:
            raise MemoryError("No room for a second copy of the vocabulary.")
        weakref.finalize(self, library.tokens_free, self._handle).atexit = False  # other threads may still be at work

    def encode(self, text: str, allowed: Collection[str]) -> list[int] | None:
        """Ids of normalised text, those special tokens recognised that are allowed; None where tiktoken is to do it."""
        raw = text.encode()
        ids = np.empty(len(raw), np.uint32)
        flags = bytes(token in allowed for token in self._special_tokens)
        count = self._encode(
            self._handle, raw + _PADDING, len(raw), flags, self._special_ids.ctypes.data, ids.ctypes.data
        )
        return None if count < 0 else self._ids[ids[:count]].tolist()


def _can_be_told(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> bool:
    """Whether text becomes ids of this vocabulary in the library's way."""
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    ids_fit = max(*ranks.values(), *special_tokens.values()) < 2**24
    return has_bytes and ids_fit and all(map(re.compile(r"<\|[^|]{1,50}\|>").fullmatch, special_tokens))


def _columns(tokens: Mapping[bytes, int]) -> tuple[bytes, ctypes.Array, ctypes.Array, ctypes.c_int64]:
    """Tokens as the library takes them: their bytes, lengths, numbers, and how many there are."""
    count = len(tokens)
    lengths = (ctypes.c_int64 * count)(*map(len, tokens))
    return b"".join(tokens), lengths, (ctypes.c_uint32 * count)(*tokens.values()), ctypes.c_int64(count)


@functools.cache
def _kinds() -> bytes:
    """The kind of each character of the first two planes, in which most emoji are."""
    return bytes(map(_kind, map(chr, range(_KNOWN))))


def _kind(character: str) -> int:
    """What a character is to the pattern; unknown where that may depend on the version of Unicode.

    Letters and numbers are those that were some in 2002 already. A later one may be news to tiktoken or to Python.
    """
    if character in "\r\n":
        return _LINE
    if character in BLANKS:
        return _SPACE
    category = unicodedata.category(character)
    if category[0] in "PS":  # no letter in any version, were it unknown there
        return _OTHER
    if category == "Cn" or category[0] != unicodedata.ucd_3_2_0.category(character)[0]:
        return _UNKNOWN
    if character == "\u017f":  # a long s, which the pattern takes for that of 's, as it ignores case
        return _UNKNOWN
    return {"L": _LETTER, "N": _NUMBER}.get(category[0], _OTHER)
