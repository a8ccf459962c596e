# Writes version.h when it changes. Run at build time: cmake -D... -P version.cmake
execute_process(COMMAND git describe --always --dirty --abbrev=12
  WORKING_DIRECTORY ${SOURCE} OUTPUT_VARIABLE git OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(git "unknown")
endif()
set(text "#define PMPD_VERSION \"${VERSION}\"
#define PMPD_GIT \"${git}\"
#define PMPD_COMPILER \"${COMPILER}\"
#define PMPD_FLAGS \"${FLAGS}\"
")
if(EXISTS ${OUT})
  file(READ ${OUT} old)
endif()
if(NOT "${old}" STREQUAL "${text}")
  file(WRITE ${OUT} "${text}")
endif()
