// The direct sum of small images, see small_images.h.
#define FASTRES_FORM SmallImages<>
#define FASTRES_FORM_EPILOGUES FASTRES_FORWARD_EPILOGUES
#include "winograd_instantiate.h"
