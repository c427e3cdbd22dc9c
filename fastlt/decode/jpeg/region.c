/* The part of a JPEG that fills a crop, without the work that the rest of the image would cost.
 *
 * Most of a JPEG's decoding is reading its entropy code, which has to be read from the beginning - but for restart markers, after
 * which it starts anew: intervals between them that do not touch the crop are passed over. Of what is read, a row of blocks at a
 * time is shrunk along the rows while it is in the cache; what that leaves is shrunk along the columns, and turned from luma and
 * chroma to red, green and blue at last, when few pixels are left.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "entropy.h"
#include "header.h"
#include "idct.h"
#include "taps.h"
#include "vector.h"

/* What became of an image. UNSURE: of a kind that is not for here, or odd; DAMAGED: others could decode it to something, but not to
 * the whole image. Either leaves nothing of use. */
enum { SOUND = 0, UNSURE = 1, DAMAGED = 2 };

typedef struct {
  int top, left, height, width; /* in pixels; may reach over the edge */
} Box;

/* --- memory that one image after the other uses */

typedef struct {
  void *at;
  size_t size;
} Memory;

/* `size` bytes, whatever is in them; NULL where there are none. */
static void *reserve(Memory *memory, size_t size) {
  if (size > memory->size) {
    free(memory->at);
    memory->at = malloc(size);
    memory->size = memory->at ? size : 0;
  }
  return memory->at;
}

typedef struct {
  Memory code, weights, strips, rows;
  Codes codes[2][4];
} Room;

static void free_room(Room *room) {
  if (!room) return;
  free(room->code.at);
  free(room->weights.at);
  free(room->strips.at);
  free(room->rows.at);
  free(room);
}

/* --- what is to be decoded */

typedef struct {
  Transform transform;
  const Codes *dc, *ac;
  int across, down;    /* blocks in an MCU */
  Taps *columns, *lines; /* (side,) from the plane's first column and line that are decoded */
  float *strip;        /* a row of MCUs, in columns of `pitch` */
  int pitch;
  float *rows;         /* (lines, stride): shrunk along the rows */
} Plane;

typedef struct {
  const Header *header;
  int side, stride;             /* pixels of the output; floats of a shrunk row */
  int top, left, bottom, right; /* in MCUs */
  int is_check;                 /* nothing is decoded, but all of the code is read */
  Plane planes[MOST_COMPONENTS];
} Work;

typedef struct {
  int start, extent, length; /* of the box, and of the image */
  int side, averages;
} Axis;

static float *cut(Axis axis, Taps *taps, float *pool) {
  int end = axis.start + axis.extent, whole = axis.start >= 0 && end <= axis.length;
  if (axis.averages) return average(axis.start, axis.extent, axis.length, axis.side, taps, pool);
  return interpolate(axis.start, axis.extent, whole ? 0 : axis.start, whole ? axis.length : end, axis.length, axis.side, taps, pool);
}

/* The MCUs of `size` pixels that taps, and a margin for colours, are in. Returns whether there are any. */
static int span_of(const Taps *taps, int side, int margin, int size, int length, int mcus, int *from, int *to) {
  int first = length, last = 0;
  for (int i = 0; i < side; i++) {
    if (!taps[i].count) continue;
    first = at_most(first, taps[i].first);
    last = at_least(last, taps[i].first + taps[i].count);
  }
  *from = at_least(first - margin, 0) / size;
  *to = at_most((at_most(last + margin, length) + size - 1) / size, mcus);
  return first < last && *from < *to;
}

/* Taps counted from the first MCU that is decoded, of `pixels` each, on. */
static float *settle(Taps *taps, int side, int from, int to, int pixels, float *pool) {
  for (int i = 0; i < side; i++) taps[i].first -= from * pixels;
  return even_out(taps, (to - from) * pixels, side, pool);
}

/* Which pixels the output is made of, by plane. */
static int plan_taps(Work *work, Box box, Room *room) {
  const Header *header = work->header;
  int side = work->side, averages = at_most(box.height, box.width) >= side, width = header->width, height = header->height;
  size_t weights = 4 * side * (most_weights(box.width, side) + most_weights(box.height, side));
  Taps *taps = reserve(&room->weights, 4 * side * sizeof(Taps) + weights * sizeof(float));
  if (!taps) return 0;
  Taps *columns = taps, *lines = taps + side, *half_columns = taps + 2 * side, *half_lines = taps + 3 * side;
  float *pool = (float *)(taps + 4 * side);
  pool = cut((Axis){box.left, box.width, width, side, averages}, columns, pool);
  pool = cut((Axis){box.top, box.height, height, side, averages}, lines, pool);
  if (!span_of(columns, side, header->across, 8 * header->across, width, header->mcus_x, &work->left, &work->right)) return 0;
  if (!span_of(lines, side, header->down, 8 * header->down, height, header->mcus_y, &work->top, &work->bottom)) return 0;
  if (header->across > 1) pool = halve(columns, (width + 1) / 2, side, half_columns, pool);
  if (header->down > 1) pool = halve(lines, (height + 1) / 2, side, half_lines, pool);
  pool = settle(columns, side, work->left, work->right, 8 * header->across, pool);
  pool = settle(lines, side, work->top, work->bottom, 8 * header->down, pool);
  if (header->across > 1) pool = settle(half_columns, side, work->left, work->right, 8, pool);
  if (header->down > 1) settle(half_lines, side, work->top, work->bottom, 8, pool);
  for (int i = 0; i < header->components; i++) {
    Plane *plane = work->planes + i;
    plane->columns = plane->across < header->across ? half_columns : columns;
    plane->lines = plane->down < header->down ? half_lines : lines;
  }
  return 1;
}

static int plan_codes(Work *work, Room *room) {
  const Header *header = work->header;
  int built[2][4] = {{0}};
  for (int i = 0; i < header->components; i++) {
    const Component *component = header->component + i;
    Plane *plane = work->planes + i;
    int tables[2] = {component->dc, component->ac};
    for (int class = 0; class < 2; class++) {
      int table = tables[class];
      if (!built[class][table] && !build_codes(&room->codes[class][table], header->codes[class][table], class == 0)) return 0;
      built[class][table] = 1;
    }
    plane->dc = &room->codes[0][component->dc];
    plane->ac = &room->codes[1][component->ac];
    plane->across = component->across;
    plane->down = component->down;
    int steps = component->quantisation;
    plan_transform(&plane->transform, header->steps[steps], header->wide_steps[steps], i == 0 ? 128 : 0);
  }
  return 1;
}

static int plan_memory(Work *work, Room *room) {
  size_t strips = 0, rows = 0;
  int mcus = work->right - work->left, lines = work->bottom - work->top;
  for (int i = 0; i < work->header->components; i++) {
    Plane *plane = work->planes + i;
    plane->pitch = 8 * plane->down;
    strips += (size_t)mcus * plane->across * 8 * plane->pitch;
    rows += (size_t)lines * plane->down * 8 * work->stride;
  }
  float *strip = reserve(&room->strips, strips * sizeof(float)), *row = reserve(&room->rows, (rows + 4 * work->stride + 8) * sizeof(float));
  if (!strip || !row) return 0;
  for (int i = 0; i < work->header->components; i++) {
    Plane *plane = work->planes + i;
    plane->strip = strip;
    plane->rows = row;
    strip += (size_t)mcus * plane->across * 8 * plane->pitch;
    row += (size_t)lines * plane->down * 8 * work->stride;
  }
  return 1;
}

/* --- entropy code to strips */

static int decode_mcu(Work *work, Bits *bits, uint32_t *last_dc, int x) {
  int16_t values[72] = {0}; /* 64, and a place for what is beyond them */
  for (int i = 0; i < work->header->components; i++) {
    Plane *plane = work->planes + i;
    for (int down = 0; down < plane->down; down++) {
      for (int across = 0; across < plane->across; across++) {
        int state = read_block(bits, plane->dc, plane->ac, last_dc + i, values);
        float *out = plane->strip + (size_t)(x * plane->across + across) * 8 * plane->pitch + 8 * down;
        if (state == BROKEN) return 0;
        if (state == FLAT) {
          fill_block(&plane->transform, values[0], out, plane->pitch);
        } else {
          transform_block(&plane->transform, values, out, plane->pitch);
          memset(values, 0, sizeof values);
        }
      }
    }
  }
  return 1;
}

static int skip_mcu(Work *work, Bits *bits, uint32_t *last_dc) {
  for (int i = 0; i < work->header->components; i++) {
    Plane *plane = work->planes + i;
    for (int k = 0; k < plane->across * plane->down; k++) {
      if (read_block(bits, plane->dc, plane->ac, last_dc + i, NULL) == BROKEN) return 0;
    }
  }
  return 1;
}

/* --- strips to rows, rows to the output */

/* Inlined, for numbers of taps that the compiler then knows. */
static inline __attribute__((always_inline)) void shrink_part(const Plane *plane, const float *strip, int stride, int last, int count, float *rows) {
  for (int x = 0; x < stride; x += WIDTH) {
    Row sums[WIDTH];
    for (int k = 0; k < WIDTH; k++) {
      const Taps *taps = plane->columns + at_most(x + k, last);
      const float *from = strip + (size_t)taps->first * plane->pitch;
      Row sum = load(from) * taps->weights[0];
      for (int j = 1; j < count; j++) sum += load(from + (size_t)j * plane->pitch) * taps->weights[j];
      sums[k] = sum;
    }
    transpose(sums);
    for (int k = 0; k < WIDTH; k++) store(rows + (size_t)k * stride + x, sums[k]);
  }
}

static void shrink_strip(const Work *work, const Plane *plane, int line) {
  int stride = work->stride, last = work->side - 1, count = plane->columns->count;
  for (int part = 0; part < plane->pitch; part += WIDTH) {
    const float *strip = plane->strip + part;
    float *rows = plane->rows + (size_t)(line + part) * stride;
    if (count == 1) shrink_part(plane, strip, stride, last, 1, rows);
    else if (count == 2) shrink_part(plane, strip, stride, last, 2, rows);
    else if (count == 3) shrink_part(plane, strip, stride, last, 3, rows);
    else shrink_part(plane, strip, stride, last, count, rows);
  }
}

static void shrink_lines(const Work *work, const Plane *plane, int y, float *restrict sums) {
  const Taps *taps = plane->lines + y;
  for (int x = 0; x < work->stride; x += WIDTH) {
    Row sum = {0};
    const float *from = plane->rows + (size_t)taps->first * work->stride + x;
    for (int k = 0; k < taps->count; k++) sum += load(from + (size_t)k * work->stride) * taps->weights[k];
    store(sums + x, sum);
  }
}

static inline Words level(Row value) { return (Words)__builtin_convertvector(clamp(value + 0.5f, 0, 255), Mask); }

/* Pixels of four bytes to three bytes each, and four bytes behind them that are of no use. */
static inline void store_pixels(Words pixels, int flip, uint8_t *out) {
  Bytes parts[WIDTH / 4];
  memcpy(parts, &pixels, sizeof parts);
  for (int i = 0; i < WIDTH / 4; i++, out += 12) {
    Bytes packed = pack_pixels(parts[flip ? WIDTH / 4 - 1 - i : i], flip);
    memcpy(out, &packed, sizeof packed);
  }
}

/* planes (3, stride) of one line to (side, 3) bytes, by way of line, which has room for 4 bytes a pixel and 4 more. */
static void colour(const float *planes, int stride, int side, int flip, uint8_t *line, uint8_t *out) {
  for (int at = 0; at < stride; at += WIDTH) {
    int x = flip ? stride - WIDTH - at : at;
    Row luma = load(planes + x), blue = load(planes + stride + x), red = load(planes + 2 * stride + x);
    Words red_green = level(luma + 1.402f * red) | level(luma - 0.344136286f * blue - 0.714136286f * red) << 8;
    store_pixels(red_green | level(luma + 1.772f * blue) << 16, flip, line + 3 * at);
  }
  memcpy(out, line + (flip ? 3 * (stride - side) : 0), 3 * side);
}

static void finish(const Work *work, float *planes, int flip, uint8_t *out) {
  memset(planes, 0, 3 * work->stride * sizeof *planes);
  uint8_t *line = (uint8_t *)(planes + 3 * work->stride);
  for (int y = 0; y < work->side; y++) {
    for (int i = 0; i < work->header->components; i++) shrink_lines(work, work->planes + i, y, planes + i * work->stride);
    colour(planes, work->stride, work->side, flip, line, out + 3 * (size_t)work->side * y);
  }
}

/* --- intervals */

enum { PADDING = MOST_BYTES + 16 };

/* The code from `at` to the next marker, without the zeros that are stuffed after each 0xff, to out; NULL: it is not wanted. Sets
 * `at` to the marker, or to `size` where there is none. Returns the bytes written. */
static size_t unstuff(const uint8_t *data, size_t *at, size_t size, uint8_t *out) {
  size_t filled = 0, from = *at;
  for (;;) {
    const uint8_t *found = from < size ? memchr(data + from, 0xff, size - from) : NULL;
    size_t stop = found && found + 1 < data + size ? (size_t)(found - data) : size;
    int is_code = stop < size && data[stop + 1] == 0, is_filling = stop < size && data[stop + 1] == 0xff;
    size_t length = stop - from + is_code;
    if (out) {
      memcpy(out + filled, data + from, length);
      filled += length;
    }
    from = stop + (is_code ? 2 : is_filling ? 1 : 0);
    if (!is_code && !is_filling) break;
  }
  *at = from;
  return filled;
}

/* MCUs first..last - 1, whose code is `size` bytes, as far as they are wanted. */
static int decode_interval(Work *work, const uint8_t *code, size_t size, int first, int last) {
  const Header *header = work->header;
  uint32_t last_dc[MOST_COMPONENTS] = {0};
  Bits bits = open_bits(code, size);
  int x = first % header->mcus_x, y = first / header->mcus_x, mcus = header->mcus_x * header->mcus_y;
  for (int mcu = first; mcu < last; mcu++) {
    int is_wanted = !work->is_check && y >= work->top && x >= work->left && x < work->right;
    if (!(is_wanted ? decode_mcu(work, &bits, last_dc, x - work->left) : skip_mcu(work, &bits, last_dc))) return DAMAGED;
    if (is_wanted && x + 1 == work->right) {
      for (int i = 0; i < header->components; i++) {
        Plane *plane = work->planes + i;
        shrink_strip(work, plane, (y - work->top) * plane->down * 8);
      }
      if (y + 1 == work->bottom) return SOUND;
    }
    if (++x == header->mcus_x) x = 0, y++;
  }
  if (reached(&bits) == bits.end) return SOUND;
  return last == mcus && is_filled(&bits) ? UNSURE : DAMAGED; /* some encoders leave bytes behind the code */
}

static int touches(const Work *work, int first, int last) {
  int width = work->header->mcus_x, from = first / width, to = (last - 1) / width;
  if (work->is_check) return 1;
  if (to < work->top || from >= work->bottom) return 0;
  return from < to || (first % width < work->right && (last - 1) % width >= work->left);
}

static int decode_scan(Work *work, const uint8_t *data, size_t size, Room *room) {
  const Header *header = work->header;
  int mcus = header->mcus_x * header->mcus_y, interval = header->interval ? header->interval : mcus;
  int end = (work->bottom - 1) * header->mcus_x + work->right;
  uint8_t *code = reserve(&room->code, size - header->scan + PADDING);
  if (!code) return UNSURE;
  size_t at = header->scan;
  for (int first = 0, number = 0; first < end; first += interval, number++) {
    int last = at_most(first + interval, mcus), is_wanted = touches(work, first, last), result = SOUND;
    size_t length = unstuff(data, &at, size, is_wanted ? code : NULL);
    if (is_wanted) {
      memset(code + length, 0, PADDING);
      result = decode_interval(work, code, length, first, last);
    }
    if (result != SOUND) return result;
    if (at >= size) return UNSURE; /* libjpeg can tell how it ends */
    if (last == mcus && data[at + 1] != 0xd9) return UNSURE;
    if (last < mcus && data[at + 1] != 0xd0 + (number & 7)) return DAMAGED;
    at += 2;
  }
  return SOUND;
}

/* --- images */

/* box of an image as stored, to out. */
static int decode_stored(const uint8_t *data, size_t size, const Header *header, Box box, int flip, int side, Room *room, uint8_t *out) {
  if (!header->is_plain || box.height < 1 || box.width < 1) return UNSURE;
  Work work = {.header = header, .side = side, .stride = (side + 7) / 8 * 8};
  if (!plan_codes(&work, room) || !plan_taps(&work, box, room) || !plan_memory(&work, room)) return UNSURE;
  int result = decode_scan(&work, data, size, room);
  if (result != SOUND) return result;
  float *planes = (float *)room->rows.at + room->rows.size / sizeof(float) - 4 * work.stride - 8;
  finish(&work, planes, flip, out);
  return SOUND;
}
/* What an EXIF orientation asks for: swap rows and columns, then go over the stored ones backwards. */
typedef struct {
  int swaps, rows_back, columns_back;
} Turn;

static Turn turn_of(int turn) {
  return (Turn){turn >= 5, turn == 3 || turn == 4 || turn == 6 || turn == 7, turn == 2 || turn == 3 || turn == 7 || turn == 8};
}

static Box stored_box(Box box, Turn turn, const Header *header) {
  if (turn.swaps) box = (Box){box.left, box.top, box.width, box.height};
  if (turn.rows_back) box.top = header->height - box.top - box.height;
  if (turn.columns_back) box.left = header->width - box.left - box.width;
  return box;
}

static void turn_square(const uint8_t *square, Turn turn, int flip, int side, uint8_t *out) {
  for (int y = 0; y < side; y++) {
    for (int x = 0; x < side; x++) {
      int from_x = flip ? side - 1 - x : x;
      int row = turn.swaps ? from_x : y, column = turn.swaps ? y : from_x;
      row = turn.rows_back ? side - 1 - row : row;
      column = turn.columns_back ? side - 1 - column : column;
      memcpy(out + 3 * ((size_t)side * y + x), square + 3 * ((size_t)side * row + column), 3);
    }
  }
}

static int decode_box(const uint8_t *data, size_t size, int height, int width, Box box, int flip, int side, Room *room,
                      uint8_t *out) {
  Header header;
  if (!read_header(data, size, &header)) return UNSURE;
  Turn turn = turn_of(header.turn);
  if ((turn.swaps ? header.width : header.height) != height || (turn.swaps ? header.height : header.width) != width) return UNSURE;
  if (header.turn == 1) return decode_stored(data, size, &header, box, flip, side, room, out);
  uint8_t *square = malloc(3 * (size_t)side * side);
  int result = square ? decode_stored(data, size, &header, stored_box(box, turn, &header), 0, side, room, square) : UNSURE;
  if (result == SOUND) turn_square(square, turn, flip, side, out);
  free(square);
  return result;
}

static int check(const uint8_t *data, size_t size, Room *room) {
  Header header;
  if (!read_header(data, size, &header) || !header.is_plain) return UNSURE;
  Work work = {.header = &header, .right = header.mcus_x, .bottom = header.mcus_y, .is_check = 1};
  return plan_codes(&work, room) ? decode_scan(&work, data, size, room) : UNSURE;
}

/* SOUND, UNSURE or DAMAGED, by the code of the whole image. */
int32_t fastlt_jpeg_check(const uint8_t *data, int64_t size) {
  Room *room = calloc(1, sizeof *room);
  int result = room ? check(data, size, room) : UNSURE;
  free_room(room);
  return result;
}

/* count images: addresses and sizes of their bytes; heights and widths that they must have, upright; boxes (count, 4) top, left,
 * height, width in the upright image; out (count, side, side, 3) RGB; results (count,) SOUND, UNSURE or DAMAGED. */
void fastlt_jpeg_boxes(const uint64_t *addresses, const int64_t *sizes, const int32_t *heights, const int32_t *widths,
                       const int32_t *boxes, const uint8_t *flips, int64_t count, int32_t side, uint8_t *out, uint8_t *results) {
  Room *room = calloc(1, sizeof *room);
  for (int64_t i = 0; i < count; i++) {
    Box box = {boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
    const uint8_t *data = (const uint8_t *)(uintptr_t)addresses[i];
    uint8_t *square = out + 3 * (size_t)side * side * i;
    results[i] = room ? decode_box(data, sizes[i], heights[i], widths[i], box, flips[i], side, room, square) : UNSURE;
  }
  free_room(room);
}

/* Whether this machine can run what is compiled for AVX2 and its like. */
int32_t fastlt_jpeg_has_avx2(void) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return 0;
#endif
}
