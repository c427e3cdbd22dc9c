/* What the header of a JPEG says, up to its first scan. */
#ifndef FASTLT_HEADER_H
#define FASTLT_HEADER_H

#include <stddef.h>
#include <stdint.h>

enum { MOST_COMPONENTS = 3 };

typedef struct {
  int id;
  int across, down; /* blocks in an MCU */
  int quantisation; /* number of its table */
  int dc, ac;       /* numbers of its Huffman tables */
} Component;

typedef struct {
  int width, height;         /* pixels, as stored */
  int turn;                  /* EXIF orientation, 1..8 */
  int components;
  Component component[MOST_COMPONENTS];
  int across, down;          /* blocks of 8 pixels in an MCU, of the component that has most */
  int mcus_x, mcus_y;
  int interval;              /* MCUs between restart markers; 0: none */
  int is_plain;              /* one baseline scan of grey, or of YCbCr with colours sampled once an MCU */
  size_t scan;               /* where the entropy code begins */
  const uint8_t *steps[4];   /* quantisation tables, in zigzag order; NULL: none */
  int wide_steps[4];         /* whether a step has two bytes */
  const uint8_t *codes[2][4]; /* Huffman tables, DC and AC: 16 counts, then the symbols; NULL: none */
} Header;

/* Whether data holds a frame and a scan that are whole. */
int read_header(const uint8_t *data, size_t size, Header *header);

#endif
