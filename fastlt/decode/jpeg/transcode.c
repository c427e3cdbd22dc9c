/* The lossless transcode that lets a JPEG be entered in its middle: see region.c. By libjpeg. */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "header.h"

enum { SOUND = 0, UNSURE = 1 }; /* UNSURE: damaged, or of a kind that is not for here */

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

/* --- transcoding */

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
