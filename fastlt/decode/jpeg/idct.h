/* The inverse cosine transform of a block, into columns: what is to be resampled along rows lies side by side.
 *
 * In floats, after Arai, Agui and Nakajima (1988), whose factors of rows and columns are part of the quantisation steps. */
#ifndef FASTLT_IDCT_H
#define FASTLT_IDCT_H

#include <stdint.h>

#include "vector.h"

typedef struct {
  float steps[64];    /* what a value counts, in rows */
  float add;          /* to all pixels */
  float low, high;    /* of a pixel */
} Transform;

static void plan_transform(Transform *transform, const uint8_t *steps, int is_wide, float add) {
  static const double FACTORS[8] = {1, 1.387039845, 1.306562965, 1.175875602, 1, 0.785694958, 0.541196100, 0.275899379};
  for (int i = 0; i < 64; i++) {
    int place = PLACES[i], step = is_wide ? steps[2 * i] << 8 | steps[2 * i + 1] : steps[i];
    transform->steps[place] = (float)(step * FACTORS[place / 8] * FACTORS[place % 8] / 8);
  }
  transform->add = add;
  transform->low = add - 128;
  transform->high = add + 127;
}

/* Transforms of eight values each, side by side. */
static inline void transform_rows(Row *row) {
  Row sum = row[0] + row[4], difference = row[0] - row[4], outer = row[2] + row[6];
  Row inner = (row[2] - row[6]) * 1.414213562f - outer;
  Row even0 = sum + outer, even3 = sum - outer, even1 = difference + inner, even2 = difference - inner;
  Row z13 = row[5] + row[3], z10 = row[5] - row[3], z11 = row[1] + row[7], z12 = row[1] - row[7];
  Row odd0 = z11 + z13, z5 = (z10 + z12) * 1.847759065f;
  Row odd1 = z5 - z10 * 2.613125930f - odd0;
  Row odd2 = (z11 - z13) * 1.414213562f - odd1;
  Row odd3 = z5 - z12 * 1.082392200f - odd2;
  row[0] = even0 + odd0;
  row[7] = even0 - odd0;
  row[1] = even1 + odd1;
  row[6] = even1 - odd1;
  row[2] = even2 + odd2;
  row[5] = even2 - odd2;
  row[3] = even3 + odd3;
  row[4] = even3 - odd3;
}

static inline void transform_block(const Transform *transform, const int16_t *values, float *out, int pitch) {
  Row first[8 / WIDTH][8], second[8 / WIDTH][8];
  for (int part = 0; part < 8 / WIDTH; part++) {
    for (int i = 0; i < 8; i++) {
      int at = 8 * i + WIDTH * part;
      first[part][i] = load_shorts(values + at) * load(transform->steps + at);
    }
    transform_rows(first[part]);
    for (int tile = 0; tile < 8 / WIDTH; tile++) {
      transpose(first[part] + WIDTH * tile);
      memcpy(second[tile] + WIDTH * part, first[part] + WIDTH * tile, WIDTH * sizeof(Row));
    }
  }
  for (int part = 0; part < 8 / WIDTH; part++) {
    transform_rows(second[part]);
    float *to = out + WIDTH * part;
    for (int i = 0; i < 8; i++) store(to + i * pitch, clamp(second[part][i] + transform->add, transform->low, transform->high));
  }
}

static void fill_block(const Transform *transform, int dc, float *out, int pitch) {
  Row value = clamp((Row){0} + (dc * transform->steps[0] + transform->add), transform->low, transform->high);
  for (int x = 0; x < 8; x++) {
    for (int y = 0; y < 8; y += WIDTH) store(out + x * pitch + y, value);
  }
}

#endif
