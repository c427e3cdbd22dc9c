/* As many floats at a time as the machine's registers hold. */
#ifndef FASTLT_VECTOR_H
#define FASTLT_VECTOR_H

#include <stdint.h>
#include <string.h>

#ifdef __AVX__
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float Row __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Mask __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

static inline Row load(const float *from) {
  Row row;
  memcpy(&row, from, sizeof row);
  return row;
}

static inline void store(float *to, Row row) { memcpy(to, &row, sizeof row); }

static inline Row load_shorts(const int16_t *from) {
  Shorts values;
  memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, Row);
}

static inline Row clamp(Row row, float low, float high) {
  Row least = (Row){0} + low, most = (Row){0} + high;
  Mask below = row < least, above = row > most;
  return (Row)(((Mask)row & ~below & ~above) | ((Mask)least & below) | ((Mask)most & above));
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE __builtin_shufflevector
#endif

#ifndef SHUFFLE

static inline void transpose(Row *row) {
  float from[WIDTH][WIDTH], to[WIDTH][WIDTH];
  memcpy(from, row, sizeof from);
  for (int x = 0; x < WIDTH; x++) {
    for (int y = 0; y < WIDTH; y++) to[x][y] = from[y][x];
  }
  memcpy(row, to, sizeof to);
}

#elif WIDTH == 8

static inline void transpose(Row *row) {
  Row pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = SHUFFLE(row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = SHUFFLE(row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    fours[i] = SHUFFLE(pairs[i], pairs[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 1] = SHUFFLE(pairs[i], pairs[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    fours[i + 2] = SHUFFLE(pairs[i + 1], pairs[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    fours[i + 3] = SHUFFLE(pairs[i + 1], pairs[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; i++) {
    row[i] = SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    row[i + 4] = SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

#else

static inline void transpose(Row *row) {
  Row pairs[4];
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = SHUFFLE(row[i], row[i + 1], 0, 4, 1, 5);
    pairs[i + 1] = SHUFFLE(row[i], row[i + 1], 2, 6, 3, 7);
  }
  row[0] = SHUFFLE(pairs[0], pairs[2], 0, 1, 4, 5);
  row[1] = SHUFFLE(pairs[0], pairs[2], 2, 3, 6, 7);
  row[2] = SHUFFLE(pairs[1], pairs[3], 0, 1, 4, 5);
  row[3] = SHUFFLE(pairs[1], pairs[3], 2, 3, 6, 7);
}

#endif

/* Four pixels of four bytes without their last bytes, forwards or backwards; the four bytes at the end are of no use. */
static inline Bytes pack_pixels(Bytes pixels, int backwards) {
#ifdef SHUFFLE
  Bytes forth = SHUFFLE(pixels, pixels, 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
  Bytes back = SHUFFLE(pixels, pixels, 12, 13, 14, 8, 9, 10, 4, 5, 6, 0, 1, 2, 15, 15, 15, 15);
  return backwards ? back : forth;
#else
  Bytes packed = {0};
  for (int i = 0; i < 12; i++) packed[i] = pixels[4 * (backwards ? 3 - i / 3 : i / 3) + i % 3];
  return packed;
#endif
}

#endif
