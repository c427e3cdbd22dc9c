/* The Huffman code of a baseline scan. A look-up gives a whole coefficient - how many zeros go before it, its value and the bits
 * that it took - wherever it fits into LOOK bits, which nearly all do. */
#ifndef FASTLT_ENTROPY_H
#define FASTLT_ENTROPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
  LOOK = 11,
  ENDS = 128,         /* how far the end of a block moves: past all that coefficients reach */
  WRONG = 255,        /* how far a code that does not exist does */
  MOST_BYTES = 64 * 4, /* that a block may take */
  PER_REFILL = 5       /* coefficients of LOOK bits out of 56 */
};

/* One coefficient, or two where both fit: from the lowest on, 8 bits each, the bits that all take, those of the first, and how far
 * each moves on; then the values of both, 16 bits each. Without a second, it is the first again, and stays where it is. Of what does
 * not fit, taking 0 bits, the second 8 bits are the length of the code, or 0, and the first value is the symbol. */
typedef uint64_t Entry;

static inline Entry one(int bits, int advance, int value) {
  uint64_t twice = (uint64_t)(uint16_t)value;
  return twice << 48 | twice << 32 | (uint64_t)advance << 16 | bits << 8 | bits;
}

static inline Entry two(Entry first, Entry second) {
  uint64_t bits = (first & 255) + (second & 255);
  return (first & 0xffff00ffff00) | bits | (second >> 16 & 255) << 24 | (second >> 32 & 0xffff) << 48;
}

static inline int bits_of(Entry entry) { return entry & 63; }

static inline int first_bits(Entry entry) { return entry >> 8 & 63; }

static inline int first_advance(Entry entry) { return entry >> 16 & 255; }

static inline int second_advance(Entry entry) { return entry >> 24 & 255; }

static inline int16_t first_value(Entry entry) { return (int16_t)(entry >> 32); }

static inline int16_t second_value(Entry entry) { return (int16_t)(entry >> 48); }

typedef struct {
  Entry entries[1 << LOOK];
  uint32_t limit[18];      /* by length: the first code, of 16 bits, that is longer */
  int offset[17];          /* by length: what to add to a code for the place of its symbol */
  const uint8_t *symbols;
  int is_dc;
} Codes;

typedef struct {
  uint64_t bits; /* the next ones, from the highest on */
  int count;     /* how many of them are there */
  const uint8_t *at, *end;
} Bits;

/* MOST_BYTES + 8 bytes must follow. */
static inline Bits open_bits(const uint8_t *at, size_t size) { return (Bits){0, 0, at, at + size}; }

/* The byte after the last one that was begun. */
static inline const uint8_t *reached(const Bits *bits) { return bits->at - bits->count / 8; }

/* Whether what is left of that byte is as encoders fill it: with ones. */
static inline int is_filled(const Bits *bits) {
  int left = bits->count & 7;
  return bits->bits >> 56 >> (8 - left) == (1u << left) - 1;
}

/* At least 56 bits, which is more than any coefficient takes. Reads 8 bytes. */
static inline void refill(Bits *bits) {
  uint64_t next;
  memcpy(&next, bits->at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  next = __builtin_bswap64(next);
#endif
  bits->bits |= next >> bits->count;
  bits->at += (63 - bits->count) >> 3;
  bits->count |= 56;
}

/* The value that `size` bits stand for: with a leading 0 it is negative. */
static inline int extend(uint32_t extra, int size) {
  return size == 0 ? 0 : extra >> (size - 1) ? (int)extra : (int)extra - (1 << size) + 1;
}

static inline Entry entry_of(const Codes *codes, int length, int symbol, uint32_t extra) {
  int size = symbol & 15, zeros = symbol >> 4;
  if (codes->is_dc) return one(length + size, 1, extend(extra, size));
  if (size == 0 && zeros < 15) return one(length, ENDS, 0);
  return one(length + size, zeros + 1, extend(extra, size));
}

static void pair(Entry *entries) {
  Entry single[1 << LOOK];
  memcpy(single, entries, sizeof single);
  for (uint32_t i = 0; i < 1 << LOOK; i++) {
    Entry first = single[i], second = single[i << bits_of(first) & ((1 << LOOK) - 1)];
    int is_pair = bits_of(first) && first_advance(first) < ENDS && bits_of(second) && bits_of(first) + bits_of(second) <= LOOK;
    if (is_pair) entries[i] = two(first, second);
  }
}

/* counts (16,) and symbols, as a header has them. Returns whether they make a code. */
static int build_codes(Codes *codes, const uint8_t *table, int is_dc) {
  memset(codes->entries, 0, sizeof codes->entries);
  codes->symbols = table + 16;
  codes->is_dc = is_dc;
  uint32_t code = 0;
  for (int length = 1, place = 0; length <= 16; length++, code <<= 1) {
    codes->offset[length] = place - (int)code;
    for (int i = 0; i < table[length - 1]; i++, code++, place++) {
      int symbol = codes->symbols[place], size = symbol & 15, spare = LOOK - length;
      if (code >= 1u << length || (is_dc && symbol > 15)) return 0;
      for (uint32_t rest = 0; spare >= 0 && rest < 1u << spare; rest++) {
        Entry *entry = codes->entries + (code << spare | rest);
        *entry = size > spare ? (uint64_t)symbol << 32 | length << 8 : entry_of(codes, length, symbol, rest >> (spare - size));
      }
    }
    codes->limit[length] = code << (16 - length);
  }
  if (!is_dc) pair(codes->entries);
  return 1;
}

static inline uint32_t extra_of(uint64_t bits, int length, int symbol) {
  return symbol & 15 ? (uint32_t)(bits << length >> (64 - (symbol & 15))) : 0;
}

/* What does not fit into an entry, which is given. */
static __attribute__((noinline)) Entry long_entry(const Codes *codes, Entry entry, uint64_t bits) {
  int length = first_bits(entry), symbol = (uint16_t)first_value(entry);
  if (length) return entry_of(codes, length, symbol, extra_of(bits, length, symbol));
  uint32_t head = bits >> 48;
  for (length = LOOK + 1; length <= 16; length++) {
    if (head >= codes->limit[length]) continue;
    symbol = codes->symbols[codes->offset[length] + (int)(head >> (16 - length))];
    return entry_of(codes, length, symbol, extra_of(bits, length, symbol));
  }
  return one(1, WRONG, 0);
}

static inline void consume(Bits *bits, int count) {
  bits->bits <<= count;
  bits->count -= count;
}

/* The next entry; LOOK bits must be there. What it has is still to be consumed, but where it did not fit: then all is there again. */
static inline Entry look(Bits *bits, const Codes *codes) {
  Entry entry = codes->entries[bits->bits >> (64 - LOOK)];
  if (__builtin_expect(bits_of(entry) == 0, 0)) {
    refill(bits);
    entry = long_entry(codes, entry, bits->bits);
  }
  return entry;
}

/* Where a coefficient goes; those past the 64th, of damaged code, and ends of blocks go to a 65th place. */
static const uint8_t PLACES[320] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
#define TEN 64, 64, 64, 64, 64, 64, 64, 64, 64, 64
    TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN, TEN,
    64, 64, 64, 64, 64, 64,
#undef TEN
};

enum { BROKEN = 0, FLAT = 1, FULL = 2 };

/* Of a block whose last coefficient is at `place`. */
static inline int state_of(const Bits *bits, int place) {
  if ((place != 63 && (place < ENDS || place >= 63 + ENDS)) || reached(bits) > bits->end) return BROKEN;
  return place == ENDS ? FLAT : FULL;
}

/* A block into values (65,), which are 0, in rows; or, where they are NULL, past it. FLAT: of one colour, by its DC alone. */
static inline int read_block(Bits *bits, const Codes *dc, const Codes *ac, uint32_t *last_dc, int16_t *values) {
  refill(bits);
  Entry entry = look(bits, dc);
  consume(bits, bits_of(entry));
  *last_dc += (uint32_t)(int32_t)first_value(entry);
  if (values) values[0] = (int16_t)*last_dc;
  if (bits->count < 56 - LOOK) refill(bits);
  for (int place = 0, taken = 1;; taken++) {
    if (taken == PER_REFILL) {
      refill(bits); /* a load that all that follows waits for: not for every coefficient */
      taken = 0;
    }
    entry = look(bits, ac);
    place += first_advance(entry);
    if (values) values[PLACES[place]] = first_value(entry);
    if (place >= 63) {
      consume(bits, first_bits(entry));
      return state_of(bits, place);
    }
    consume(bits, bits_of(entry));
    if (__builtin_expect(bits_of(entry) > LOOK, 0)) refill(bits);
    place += second_advance(entry);
    if (values) values[PLACES[place]] = second_value(entry);
    if (place >= 63) return state_of(bits, place);
  }
}

#endif
