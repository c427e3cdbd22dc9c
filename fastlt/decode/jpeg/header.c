#include "header.h"

#include <string.h>

enum { SOF0 = 0xc0, SOF1 = 0xc1, DHT = 0xc4, SOI = 0xd8, SOS = 0xda, DQT = 0xdb, DRI = 0xdd, APP0 = 0xe0, APP1 = 0xe1, APP14 = 0xee };

typedef struct {
  int jfif, adobe; /* adobe: its colour transform, -1 where there is none */
} Marks;

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

static int read_steps(const uint8_t *at, const uint8_t *end, Header *header) {
  while (at < end) {
    int table = at[0] & 15, is_wide = at[0] >> 4;
    if (table > 3 || is_wide > 1 || end - at < 1 + (is_wide ? 128 : 64)) return 0;
    header->steps[table] = at + 1;
    header->wide_steps[table] = is_wide;
    at += 1 + (is_wide ? 128 : 64);
  }
  return 1;
}

static int read_codes(const uint8_t *at, const uint8_t *end, Header *header) {
  while (at < end) {
    int class = at[0] >> 4, table = at[0] & 15, symbols = 0;
    if (class > 1 || table > 3 || end - at < 17) return 0;
    for (int length = 1; length <= 16; length++) symbols += at[length];
    if (symbols > 256 || end - at < 17 + symbols) return 0;
    header->codes[class][table] = at + 1;
    at += 17 + symbols;
  }
  return 1;
}

static int read_frame(const uint8_t *at, size_t size, Header *header) {
  if (header->components || size < 6) return 0;
  int count = at[5];
  if (count < 1 || size < 6 + 3 * (size_t)count) return 0;
  header->components = count;
  header->height = be16(at + 1);
  header->width = be16(at + 3);
  header->across = header->down = 1;
  header->is_plain = at[0] == 8 && (count == 1 || count == 3);
  for (int i = 0; i < count; i++) {
    const uint8_t *from = at + 6 + 3 * i;
    /* The MCU of a scan of one component is one block. */
    int across = count == 1 ? 1 : from[1] >> 4, down = count == 1 ? 1 : from[1] & 15;
    if (i < MOST_COMPONENTS) header->component[i] = (Component){from[0], across, down, from[2], 0, 0};
    if (across > header->across) header->across = across;
    if (down > header->down) header->down = down;
    if (across < 1 || down < 1 || (i == 0 ? across > 2 || down > 2 : across > 1 || down > 1) || from[2] > 3) header->is_plain = 0;
  }
  header->mcus_x = (header->width + 8 * header->across - 1) / (8 * header->across);
  header->mcus_y = (header->height + 8 * header->down - 1) / (8 * header->down);
  return header->mcus_x > 0 && header->mcus_y > 0;
}

/* Whether three components are YCbCr, as libjpeg decides it. */
static int is_ycc(const Header *header, Marks marks) {
  const Component *of = header->component;
  if (marks.jfif) return 1;
  if (marks.adobe >= 0) return marks.adobe == 1;
  return of[0].id == 1 && of[1].id == 2 && of[2].id == 3;
}

static int read_scan(const uint8_t *at, size_t size, Marks marks, Header *header) {
  if (!header->components || size < 1 || size < 4 + 2 * (size_t)at[0]) return 0;
  if (at[0] != header->components || (at[0] == 3 && !is_ycc(header, marks))) header->is_plain = 0;
  for (int i = 0; header->is_plain && i < at[0]; i++) {
    Component *component = header->component + i;
    component->dc = at[2 + 2 * i] >> 4;
    component->ac = at[2 + 2 * i] & 15;
    if (at[1 + 2 * i] != component->id || component->dc > 3 || component->ac > 3) header->is_plain = 0;
    else if (!header->codes[0][component->dc] || !header->codes[1][component->ac] || !header->steps[component->quantisation]) header->is_plain = 0;
  }
  return 1;
}

static int is_frame(int marker) { return marker >= SOF0 && marker <= 0xcf && marker != DHT && marker != 0xc8 && marker != 0xcc; }

int read_header(const uint8_t *data, size_t size, Header *header) {
  memset(header, 0, sizeof *header);
  header->turn = 1;
  Marks marks = {0, -1};
  int is_baseline = 0;
  if (size < 4 || data[0] != 0xff || data[1] != SOI) return 0;
  for (size_t at = 2; at + 4 <= size;) {
    if (data[at] != 0xff) return 0;
    int marker = data[at + 1];
    if (marker == 0xff) {
      at++;
      continue;
    }
    size_t length = be16(data + at + 2);
    if (length < 2 || at + 2 + length > size) return 0;
    const uint8_t *segment = data + at + 4, *end = segment + length - 2;
    length -= 2;
    at += 4 + length;
    if (marker == DQT && !read_steps(segment, end, header)) return 0;
    if (marker == DHT && !read_codes(segment, end, header)) return 0;
    if (marker == DRI && length >= 2) header->interval = be16(segment);
    if (marker == APP0 && length >= 5 && !memcmp(segment, "JFIF", 5)) marks.jfif = 1;
    if (marker == APP14 && length >= 12 && !memcmp(segment, "Adobe", 5)) marks.adobe = segment[11];
    if (marker == APP1 && header->turn == 1) header->turn = orientation(segment, length);
    if (is_frame(marker)) {
      is_baseline = marker == SOF0 || marker == SOF1;
      if (!read_frame(segment, length, header)) return 0;
    }
    if (marker == SOS) {
      header->scan = at;
      if (!read_scan(segment, length, marks, header)) return 0;
      header->is_plain = header->is_plain && is_baseline;
      return 1;
    }
  }
  return 0;
}
