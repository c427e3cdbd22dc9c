/* What an output row or column is made of, as images.fill_box has it: averages where a box shrinks both ways, else weights that
 * fall off linearly; nothing of what is beyond the edge, which is black. */
#ifndef FASTLT_TAPS_H
#define FASTLT_TAPS_H

#include <math.h>

typedef struct {
  int first, count; /* pixels inside the image */
  float *weights;
} Taps;

static inline int at_least(int value, int least) { return value < least ? least : value; }

static inline int at_most(int value, int most) { return value > most ? most : value; }

/* Weights that any of `side` outputs of a box may have, with those of their colours. */
static inline size_t most_weights(int extent, int side) { return 2 * (size_t)(extent / side) + 8; }

/* Of `side` outputs for a box of `extent` pixels from `start` on, of `length` that there are. Weights go to pool; returns its end. */
static float *average(int start, int extent, int length, int side, Taps *taps, float *pool) {
  double scale = (double)extent / side;
  for (int i = 0; i < side; i++) {
    int low = (int)floor(start + i * scale + 0.5), high = at_least((int)floor(start + (i + 1) * scale + 0.5), low + 1);
    taps[i] = (Taps){at_most(at_least(low, 0), length), 0, pool};
    for (int k = taps[i].first; k < at_most(high, length); k++, taps[i].count++) *pool++ = 1.0f / (high - low);
  }
  return pool;
}

/* from, to: what the weights are normalised over. */
static float *interpolate(int start, int extent, int from, int to, int length, int side, Taps *taps, float *pool) {
  double scale = (double)extent / side, support = scale > 1 ? scale : 1;
  for (int i = 0; i < side; i++) {
    double centre = start + (i + 0.5) * scale, total = 0;
    int low = at_least((int)floor(centre - support + 0.5), from), high = at_most((int)floor(centre + support + 0.5), to);
    for (int k = low; k < high; k++) total += fmax(0, 1 - fabs(k - centre + 0.5) / support);
    taps[i] = (Taps){at_most(at_least(low, 0), length), 0, pool};
    for (int k = taps[i].first; k < at_most(high, length); k++, taps[i].count++) {
      *pool++ = (float)(fmax(0, 1 - fabs(k - centre + 0.5) / support) / total);
    }
  }
  return pool;
}

/* All to as many pixels as the longest has, with weights of 0 for more, so that a loop over them is foreseen; `length` pixels there
 * are. Returns the end of pool. */
static float *even_out(Taps *taps, int length, int side, float *pool) {
  int most = 1;
  for (int i = 0; i < side; i++) most = at_least(most, taps[i].count);
  for (int i = 0; i < side; i++, pool += most) {
    int first = taps[i].count ? at_least(at_most(taps[i].first, length - most), 0) : 0, before = taps[i].first - first;
    for (int k = 0; k < most; k++) pool[k] = 0;
    for (int k = 0; k < taps[i].count; k++) pool[before + k] = taps[i].weights[k];
    taps[i] = (Taps){first, most, pool};
  }
  return pool;
}

/* The same in pixels of colours that are sampled half as often, of which there are `length`: between them they are interpolated,
 * three parts of the nearer one and one of the other, as libjpeg does. */
static float *halve(const Taps *taps, int length, int side, Taps *halved, float *pool) {
  for (int i = 0; i < side; i++) {
    int first = at_least((taps[i].first - 1) >> 1, 0), last = at_most((taps[i].first + taps[i].count) >> 1, length - 1);
    int count = taps[i].count ? last - first + 1 : 0;
    halved[i] = (Taps){first, count, pool};
    for (int k = 0; k < count; k++) pool[k] = 0;
    for (int k = 0; k < taps[i].count; k++) {
      int pixel = taps[i].first + k, near = at_most(pixel >> 1, length - 1) - first;
      int other = at_most(at_least((pixel >> 1) + (pixel & 1 ? 1 : -1), 0), length - 1) - first;
      pool[near] += 0.75f * taps[i].weights[k];
      pool[other] += 0.25f * taps[i].weights[k];
    }
    pool += count;
  }
  return pool;
}

#endif
