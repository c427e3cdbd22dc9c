/* The part of a JPEG that fills a crop, without the work that the rest of the image would cost; and the lossless transcode that
 * lets an image be entered in its middle.
 *
 * Most of a JPEG's decoding is reading its entropy code, which has to be read from the beginning - but for restart markers,
 * after which it starts anew. The intervals between them that touch the crop are handed to libjpeg as a small JPEG of their
 * own. What is left is decoded row by row and averaged as it comes, so that it never leaves the cache.
 */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum { SOUND = 0, UNSURE = 1 }; /* UNSURE: damaged, or of a kind that is not for here; out holds nothing of use */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORISED
#endif

/* --- libjpeg's errors, as return values */

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf back;
  int warnings; /* libjpeg's own count is set back when it begins to write */
} Errors;

static void leave(j_common_ptr info) { longjmp(((Errors *)info->err)->back, 1); }

static void count_warning(j_common_ptr info, int level) {
  if (level < 0) ((Errors *)info->err)->warnings++;
}

static struct jpeg_error_mgr *silent(Errors *errors) {
  jpeg_std_error(&errors->base);
  errors->base.error_exit = leave;
  errors->base.emit_message = count_warning;
  errors->warnings = 0;
  return &errors->base;
}

/* --- what the header says */

typedef struct {
  int width, height;               /* pixels, as stored */
  int turn;                        /* EXIF orientation, 1..8 */
  int mcu_width, mcu_height;       /* pixels */
  int mcus_x, mcus_y;
  int interval;                    /* MCUs between restart markers; 0: none */
  int spliceable;                  /* one baseline scan of all components */
  size_t scan;                     /* where the entropy code begins */
  uint8_t tables[2048];            /* the segments that a decoder needs */
  size_t tables_size, frame;       /* frame: where the frame header is in tables */
} Header;

static int be16(const uint8_t *at) { return at[0] << 8 | at[1]; }

static uint32_t tiff_int(const uint8_t *at, int bytes, int little) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; i++) value |= (uint32_t)at[i] << 8 * (little ? i : bytes - 1 - i);
  return value;
}

/* The orientation in an APP1 segment; 1 where there is none. */
static int orientation(const uint8_t *data, size_t size) {
  if (size < 14 || memcmp(data, "Exif\0\0", 6)) return 1;
  const uint8_t *tiff = data + 6;
  size -= 6;
  int little = tiff[0] == 'I';
  size_t entry = tiff_int(tiff + 4, 4, little);
  if (entry + 2 > size) return 1;
  int count = tiff_int(tiff + entry, 2, little);
  for (entry += 2; count-- > 0 && entry + 12 <= size; entry += 12) {
    if (tiff_int(tiff + entry, 2, little) != 0x0112) continue;
    uint32_t turn = tiff_int(tiff + entry + 8, 2, little);
    return tiff_int(tiff + entry + 2, 2, little) == 3 && turn >= 1 && turn <= 8 ? (int)turn : 1;
  }
  return 1;
}

static void read_frame(const uint8_t *segment, int length, Header *header) {
  int components = length >= 8 ? segment[9] : 0, across = 1, down = 1;
  if (components < 1 || length < 8 + 3 * components) return;
  for (int i = 0; i < components; i++) {
    int sampling = segment[11 + 3 * i];
    across = across > sampling >> 4 ? across : sampling >> 4;
    down = down > (sampling & 15) ? down : sampling & 15;
  }
  if (components == 1) across = down = 1; /* the MCU of a scan of one component is one block */
  header->height = be16(segment + 5);
  header->width = be16(segment + 7);
  header->mcu_width = 8 * across;
  header->mcu_height = 8 * down;
  header->mcus_x = (header->width + header->mcu_width - 1) / header->mcu_width;
  header->mcus_y = (header->height + header->mcu_height - 1) / header->mcu_height;
}

static int is_frame(int marker) { return marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc; }

static int is_needed(int marker) { /* DQT, DHT, DRI, frame, SOS, JFIF and Adobe */
  return marker == 0xdb || marker == 0xc4 || marker == 0xdd || is_frame(marker) || marker == 0xda || marker == 0xe0 || marker == 0xee;
}

/* Whether there is a frame and a scan; segments up to the first scan are read. */
static int read_header(const uint8_t *data, size_t size, Header *header) {
  memset(header, 0, sizeof *header);
  header->turn = 1;
  int components = 0, baseline = 0, complete = 1;
  if (size < 4 || data[0] != 0xff || data[1] != 0xd8) return 0;
  for (size_t at = 2; at + 4 <= size;) {
    if (data[at] != 0xff) return 0;
    int marker = data[at + 1];
    if (marker == 0xff) {
      at++;
      continue;
    }
    int length = be16(data + at + 2);
    if (length < 2 || at + 2 + length > size) return 0;
    const uint8_t *segment = data + at;
    if (is_needed(marker)) {
      if (is_frame(marker)) {
        header->frame = header->tables_size;
        baseline = marker == 0xc0 || marker == 0xc1;
        components = length >= 8 ? segment[9] : 0;
        read_frame(segment, length, header);
      }
      if (header->tables_size + length + 2 <= sizeof header->tables) {
        memcpy(header->tables + header->tables_size, segment, length + 2);
        header->tables_size += length + 2;
      } else {
        complete = 0;
      }
    }
    if (marker == 0xdd && length >= 4) header->interval = be16(segment + 4);
    if (marker == 0xe1 && header->turn == 1) header->turn = orientation(segment + 4, length - 2);
    at += 2 + length;
    if (marker == 0xda) {
      header->scan = at;
      header->spliceable = baseline && complete && length >= 3 && segment[4] == components;
      return header->mcus_x > 0 && header->mcus_y > 0;
    }
  }
  return 0;
}

/* --- the intervals that touch a box, as a JPEG of their own */

typedef struct {
  int top, left, height, width; /* in pixels; may reach over the edge */
} Box;

/* Where the next marker is; size where there is none. */
static size_t find_marker(const uint8_t *data, size_t at, size_t size) {
  while (at < size) {
    const uint8_t *found = memchr(data + at, 0xff, size - at);
    if (!found || found + 1 >= data + size) return size;
    at = found - data;
    if (found[1] != 0 && found[1] != 0xff) return at;
    at += found[1] == 0 ? 2 : 1;
  }
  return size;
}

static int at_least(int value, int least) { return value < least ? least : value; }

static int at_most(int value, int most) { return value > most ? most : value; }

/* A JPEG of the intervals that box and `margin` pixels around touch, in out, which has room for size bytes and the tables; box
 * is moved into it. Returns its size; 0: the image is to be read as it is. */
static size_t splice(const uint8_t *data, size_t size, const Header *header, Box *box, int margin, uint8_t *out) {
  if (!header->spliceable || !header->interval || header->mcus_x % header->interval) return 0;
  int per_row = header->mcus_x / header->interval, wide = header->interval * header->mcu_width, high = header->mcu_height;
  int top = at_least(box->top - margin, 0) / high, left = at_least(box->left - margin, 0) / wide;
  int bottom = at_most((box->top + box->height + margin + high - 1) / high, header->mcus_y);
  int right = at_most((box->left + box->width + margin + wide - 1) / wide, per_row);
  if (top >= bottom || left >= right || (top == 0 && left == 0 && bottom == header->mcus_y && right == per_row)) return 0;
  int height = at_most(bottom * high, header->height) - top * high;
  int width = at_most(right * wide, header->width) - left * wide;
  out[0] = 0xff;
  out[1] = 0xd8;
  memcpy(out + 2, header->tables, header->tables_size);
  uint8_t *frame = out + 2 + header->frame;
  frame[5] = height >> 8;
  frame[6] = height;
  frame[7] = width >> 8;
  frame[8] = width;
  size_t at = header->scan, filled = 2 + header->tables_size;
  unsigned taken = 0, last = (bottom - 1) * per_row + right - 1;
  for (unsigned number = 0; number <= last; number++) {
    size_t end = find_marker(data, at, size);
    unsigned expected = number + 1 == (unsigned)(header->mcus_y * per_row) ? 0xd9 : 0xd0 + (number & 7);
    if (end >= size || data[end + 1] != expected) return 0;
    int row = number / per_row, column = number % per_row;
    if (row >= top && column >= left && column < right) {
      memcpy(out + filled, data + at, end - at);
      filled += end - at;
      out[filled++] = 0xff;
      out[filled++] = 0xd0 + (taken++ & 7);
    }
    at = end + 2;
  }
  out[filled - 1] = 0xd9;
  box->top -= top * high;
  box->left -= left * wide;
  return filled;
}

/* --- resampling, as images.fill_box has it: averages where a box shrinks both ways, else weights that fall off linearly */

typedef struct { /* of one output row or column: the pixels that it is made of */
  int first, count; /* those inside the image */
  int full;         /* with those beyond its edge, which are black */
} Span;

/* Of `side` outputs for a box of `extent` pixels from `start` on, of `length` that there are. */
static void cut_spans(double start, double extent, int length, int side, Span *spans) {
  double scale = extent / side;
  for (int i = 0; i < side; i++) {
    int low = (int)floor(start + i * scale + 0.5), high = (int)floor(start + (i + 1) * scale + 0.5);
    high = at_least(high, low + 1);
    spans[i].full = high - low;
    spans[i].first = at_most(at_least(low, 0), length);
    spans[i].count = at_least(at_most(high, length) - spans[i].first, 0);
  }
}

typedef uint16_t Half4 __attribute__((vector_size(8), aligned(2)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint8_t Byte4 __attribute__((vector_size(4), aligned(1)));
typedef float Float4 __attribute__((vector_size(16), aligned(4)));

VECTORISED static void add_row(uint16_t *restrict sums, const uint8_t *restrict row, int count) {
  for (int i = 0; i < count; i++) sums[i] += row[i];
}

/* sums over `high` rows to one output row. Four channels at a time, of which the last is the next pixel's. */
VECTORISED static void average(const uint16_t *sums, const Span *spans, int side, int high, int flip, uint8_t *out) {
  for (int x = 0; x < side; x++) {
    uint8_t *pixel = out + 3 * (flip ? side - 1 - x : x);
    const uint16_t *at = sums + 3 * spans[x].first;
    Word4 sum = {0};
    for (int k = 0; k < spans[x].count; k++) sum += __builtin_convertvector(*(const Half4 *)(at + 3 * k), Word4);
    uint32_t area = (uint32_t)high * spans[x].full, inverse = ((1u << 20) + area / 2) / area;
    sum = (sum * inverse + (1u << 19)) >> 20;
    for (int channel = 0; channel < 3; channel++) pixel[channel] = sum[channel];
  }
}

enum { MOST_AREA = 4096 }; /* beyond which the 20 bits of `average` would no longer round to the nearest */

typedef struct { /* triangular weights of one output row or column */
  int first, count;
  float *weights;
} Tent;

/* from, to: what the weights are normalised over; pixels outside of 0..length - 1 are black. Weights go to pool. */
static float *pitch_tents(int start, int extent, int from, int to, int length, int side, Tent *tents, float *pool) {
  double scale = (double)extent / side, support = scale > 1 ? scale : 1;
  for (int i = 0; i < side; i++) {
    double centre = start + (i + 0.5) * scale, total = 0;
    int low = at_least((int)floor(centre - support + 0.5), from), high = at_most((int)floor(centre + support + 0.5), to);
    for (int k = low; k < high; k++) total += fmax(0, 1 - fabs(k - centre + 0.5) / support);
    tents[i] = (Tent){at_most(at_least(low, 0), length), 0, pool};
    for (int k = tents[i].first; k < at_most(high, length); k++, tents[i].count++) {
      *pool++ = (float)(fmax(0, 1 - fabs(k - centre + 0.5) / support) / total);
    }
  }
  return pool;
}

VECTORISED static void weigh_row(const uint8_t *row, const Tent *tents, int side, float *out) {
  for (int x = 0; x < side; x++) {
    const uint8_t *at = row + 3 * tents[x].first;
    Float4 sum = {0};
    for (int k = 0; k < tents[x].count; k++) {
      sum += __builtin_convertvector(*(const Byte4 *)(at + 3 * k), Float4) * tents[x].weights[k];
    }
    *(Float4 *)(out + 3 * x) = sum; /* the fourth is overwritten by the next pixel, or in the margin */
  }
}

VECTORISED static void weigh_rows(const float *rows, size_t stride, Tent tent, int first, int count, float *restrict sums) {
  for (int i = 0; i < count; i++) sums[i] = 0.5f;
  for (int k = 0; k < tent.count; k++) {
    const float *row = rows + (tent.first - first + k) * stride;
    float weight = tent.weights[k];
    for (int i = 0; i < count; i++) sums[i] += weight * row[i];
  }
}

/* --- decoding */

typedef struct { /* libjpeg at work on some columns of an image; rows come one after the other */
  struct jpeg_decompress_struct jpeg;
  Errors errors;
  uint8_t *row;
  int next;  /* the row that comes next */
  int left;  /* column of the first pixel of a row */
  int width; /* pixels of a row */
} Reader;

static const uint8_t *read_row(Reader *reader, int wanted) {
  if (wanted > reader->next) reader->next += jpeg_skip_scanlines(&reader->jpeg, wanted - reader->next);
  while (reader->next <= wanted) {
    if (!jpeg_read_scanlines(&reader->jpeg, &reader->row, 1)) leave((j_common_ptr)&reader->jpeg);
    reader->next++;
  }
  return reader->row;
}

static void start(Reader *reader, const uint8_t *data, size_t size, int shrink) {
  jpeg_mem_src(&reader->jpeg, data, size);
  jpeg_read_header(&reader->jpeg, TRUE);
  reader->jpeg.out_color_space = JCS_RGB;
  reader->jpeg.dct_method = JDCT_ISLOW;
  reader->jpeg.do_fancy_upsampling = FALSE;
  reader->jpeg.scale_num = 1;
  reader->jpeg.scale_denom = shrink;
  jpeg_start_decompress(&reader->jpeg);
}

/* Restricts the reader to the columns first..last - 1, and some around; needs memory for a row. */
static void restrict_columns(Reader *reader, int first, int last) {
  JDIMENSION left = first, width = last - first;
  if (left > 0 || width < reader->jpeg.output_width) {
    jpeg_crop_scanline(&reader->jpeg, &left, &width);
  }
  reader->left = left;
  reader->width = width;
  reader->next = 0;
  j_common_ptr info = (j_common_ptr)&reader->jpeg;
  reader->row = info->mem->alloc_large(info, JPOOL_IMAGE, 3 * (size_t)width + 16);
}

static int shrink_box(Reader *reader, const Box *box, int shrink, int side, int flip, uint8_t *out) {
  j_common_ptr info = (j_common_ptr)&reader->jpeg;
  Span *across = info->mem->alloc_large(info, JPOOL_IMAGE, 2 * side * sizeof(Span)), *down = across + side;
  cut_spans((double)box->left / shrink, (double)box->width / shrink, reader->jpeg.output_width, side, across);
  cut_spans((double)box->top / shrink, (double)box->height / shrink, reader->jpeg.output_height, side, down);
  int first = across[0].first, last = across[side - 1].first + across[side - 1].count;
  if (first >= last || across[0].full > MOST_AREA) return UNSURE;
  restrict_columns(reader, first, last);
  for (int x = 0; x < side; x++) across[x].first = at_least(across[x].first - reader->left, 0);
  uint16_t *sums = info->mem->alloc_large(info, JPOOL_IMAGE, (3 * (size_t)reader->width + 16) * sizeof *sums);
  for (int y = 0; y < side; y++) {
    if (down[y].full > 256 || down[y].full * (across[0].full + 1) > MOST_AREA) return UNSURE;
    memset(sums, 0, (3 * (size_t)reader->width + 16) * sizeof *sums);
    for (int k = 0; k < down[y].count; k++) add_row(sums, read_row(reader, down[y].first + k), 3 * reader->width);
    average(sums, across, side, down[y].full, flip, out + 3 * (size_t)side * y);
  }
  return SOUND;
}

static int enlarge_box(Reader *reader, const Box *box, int side, int flip, uint8_t *out) {
  j_common_ptr info = (j_common_ptr)&reader->jpeg;
  int columns = reader->jpeg.output_width, lines = reader->jpeg.output_height;
  int whole = box->top >= 0 && box->left >= 0 && box->top + box->height <= lines && box->left + box->width <= columns;
  size_t taps = 2 * (size_t)side * (2 * (at_least(box->width, box->height) / side) + 6);
  Tent *across = info->mem->alloc_large(info, JPOOL_IMAGE, 2 * side * sizeof(Tent)), *down = across + side;
  float *pool = info->mem->alloc_large(info, JPOOL_IMAGE, taps * sizeof *pool);
  int right = box->left + box->width, bottom = box->top + box->height;
  pool = pitch_tents(box->left, box->width, whole ? 0 : box->left, whole ? columns : right, columns, side, across, pool);
  pitch_tents(box->top, box->height, whole ? 0 : box->top, whole ? lines : bottom, lines, side, down, pool);
  int left = at_least(box->left - 2, 0), from = down[0].first, to = down[side - 1].first + down[side - 1].count;
  right = at_most(right + 2, columns);
  for (int i = 0; i < side; i++) {
    if (across[i].count) left = at_most(left, across[i].first), right = at_least(right, across[i].first + across[i].count);
    if (down[i].count) from = at_most(from, down[i].first), to = at_least(to, down[i].first + down[i].count);
  }
  if (left >= right || from >= to) return UNSURE;
  restrict_columns(reader, left, right);
  for (int i = 0; i < side; i++) across[i].first = across[i].count ? across[i].first - reader->left : 0;
  size_t stride = 3 * (size_t)side + 4;
  float *rows = info->mem->alloc_large(info, JPOOL_IMAGE, (to - from + 1) * stride * sizeof *rows), *sums = rows + (to - from) * stride;
  for (int y = from; y < to; y++) weigh_row(read_row(reader, y), across, side, rows + (y - from) * stride);
  for (int y = 0; y < side; y++) {
    weigh_rows(rows, stride, down[y], from, 3 * side, sums);
    for (int x = 0; x < side; x++) {
      uint8_t *pixel = out + 3 * ((size_t)side * y + (flip ? side - 1 - x : x));
      for (int channel = 0; channel < 3; channel++) pixel[channel] = (uint8_t)sums[3 * x + channel];
    }
  }
  return SOUND;
}

/* How many times libjpeg's own scaling may halve a box, which leaves no fewer pixels than wanted. */
static int shrink_of(Box box, int side) {
  int shrink = 1;
  while (shrink < 8 && at_most(box.height, box.width) >= 2 * shrink * side) shrink *= 2;
  return shrink;
}

static int read_box(const uint8_t *data, size_t size, Box box, int flip, int side, uint8_t *out) {
  Reader reader;
  reader.jpeg.err = silent(&reader.errors);
  jpeg_create_decompress(&reader.jpeg);
  volatile int result = UNSURE;
  if (!setjmp(reader.errors.back)) {
    int shrink = shrink_of(box, side);
    start(&reader, data, size, shrink);
    result = at_most(box.height, box.width) >= side ? shrink_box(&reader, &box, shrink, side, flip, out)
                                                    : enlarge_box(&reader, &box, side, flip, out);
    if (reader.errors.warnings) result = UNSURE;
  }
  jpeg_destroy_decompress(&reader.jpeg);
  return result;
}

/* box of an image as stored, to out. */
static int decode_stored(const uint8_t *data, size_t size, const Header *header, Box box, int flip, int side, uint8_t *out) {
  if (!header->interval) return read_box(data, size, box, flip, side, out);
  uint8_t *small = malloc(size + sizeof header->tables + 2);
  if (!small) return UNSURE;
  int margin = at_most(box.height, box.width) >= side ? 0 : at_least(box.height, box.width) / side + 2;
  size_t small_size = splice(data, size, header, &box, margin, small);
  int result = small_size ? read_box(small, small_size, box, flip, side, out) : read_box(data, size, box, flip, side, out);
  free(small);
  return result;
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

static int decode_box(const uint8_t *data, size_t size, int height, int width, Box box, int flip, int side, uint8_t *out) {
  Header header;
  if (!read_header(data, size, &header)) return UNSURE;
  Turn turn = turn_of(header.turn);
  if ((turn.swaps ? header.width : header.height) != height || (turn.swaps ? header.height : header.width) != width) return UNSURE;
  if (header.turn == 1) return decode_stored(data, size, &header, box, flip, side, out);
  uint8_t *square = malloc(3 * (size_t)side * side);
  int result = square ? decode_stored(data, size, &header, stored_box(box, turn, &header), 0, side, square) : UNSURE;
  if (result == SOUND) turn_square(square, turn, flip, side, out);
  free(square);
  return result;
}

/* count images: addresses and sizes of their bytes; heights and widths that they must have, upright; boxes (count, 4) top, left,
 * height, width in the upright image; out (count, side, side, 3) RGB; results (count,) 0 or, where out has nothing of use, 1. */
void fastlt_jpeg_boxes(const uint64_t *addresses, const int64_t *sizes, const int32_t *heights, const int32_t *widths,
                       const int32_t *boxes, const uint8_t *flips, int64_t count, int32_t side, uint8_t *out, uint8_t *results) {
  for (int64_t i = 0; i < count; i++) {
    Box box = {boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
    const uint8_t *data = (const uint8_t *)(uintptr_t)addresses[i];
    results[i] = decode_box(data, sizes[i], heights[i], widths[i], box, flips[i], side, out + 3 * (size_t)side * side * i);
  }
}

/* --- lossless transcoding */

/* MCUs between restart markers: an equal share of a row of MCUs, the shortest of at least LEAST_INTERVAL. */
enum { LEAST_INTERVAL = 4, MOST_PER_ROW = 12 };

static int choose_interval(int mcus_x) {
  for (int per_row = MOST_PER_ROW; per_row > 1; per_row--) {
    if (mcus_x % per_row == 0 && mcus_x / per_row >= LEAST_INTERVAL) return mcus_x / per_row;
  }
  return mcus_x;
}

typedef struct { /* what has to be given back, however a transcode ends */
  struct jpeg_decompress_struct from;
  struct jpeg_compress_struct to;
  Errors errors;
} Transcoding;

static void copy_markers(Transcoding *work) {
  for (jpeg_saved_marker_ptr marker = work->from.marker_list; marker; marker = marker->next) {
    int is_jfif = marker->marker == JPEG_APP0 && marker->data_length >= 5 && !memcmp(marker->data, "JFIF\0", 5);
    int is_adobe = marker->marker == JPEG_APP0 + 14 && marker->data_length >= 5 && !memcmp(marker->data, "Adobe", 5);
    if ((is_jfif && work->to.write_JFIF_header) || (is_adobe && work->to.write_Adobe_marker)) continue; /* written already */
    jpeg_write_marker(&work->to, marker->marker, marker->data, marker->data_length);
  }
}

static void rewrite(Transcoding *work, const uint8_t *data, size_t size, int interval, uint8_t **out, unsigned long *out_size) {
  jpeg_mem_src(&work->from, data, size);
  jpeg_save_markers(&work->from, JPEG_COM, 0xffff);
  for (int which = 0; which < 16; which++) jpeg_save_markers(&work->from, JPEG_APP0 + which, 0xffff);
  jpeg_read_header(&work->from, TRUE);
  jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&work->from);
  jpeg_copy_critical_parameters(&work->from, &work->to);
  work->to.optimize_coding = TRUE;
  work->to.arith_code = FALSE;
  work->to.restart_interval = interval;
  jpeg_mem_dest(&work->to, out, out_size);
  jpeg_write_coefficients(&work->to, coefficients);
  copy_markers(work);
  jpeg_finish_compress(&work->to);
  jpeg_finish_decompress(&work->from);
}

/* Baseline, with optimised Huffman tables and a restart marker every few MCUs; pixels and metadata as before. out is to be given
 * to fastlt_jpeg_free. Returns 0, or 1 where the image is damaged or of another kind, and out is NULL. */
int32_t fastlt_jpeg_transcode(const uint8_t *data, int64_t size, uint8_t **out, int64_t *out_size) {
  Header header;
  *out = NULL;
  if (!read_header(data, size, &header)) return UNSURE;
  /* libjpeg takes larger memory where this is not enough, and then leaves this to us. */
  unsigned long written_size = 2 * size + 65536;
  uint8_t *room = malloc(written_size), *written = room;
  if (!room) return UNSURE;
  Transcoding work;
  work.from.err = work.to.err = silent(&work.errors);
  jpeg_create_decompress(&work.from);
  jpeg_create_compress(&work.to);
  volatile int result = UNSURE;
  if (!setjmp(work.errors.back)) {
    rewrite(&work, data, size, choose_interval(header.mcus_x), &written, &written_size);
    if (!work.errors.warnings) {
      result = SOUND;
      *out = written;
      *out_size = (int64_t)written_size;
    }
  }
  jpeg_destroy_compress(&work.to);
  jpeg_destroy_decompress(&work.from);
  if (*out != room) free(room);
  return result;
}

void fastlt_jpeg_free(uint8_t *data) { free(data); }
