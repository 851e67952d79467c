/* SPDX-License-Identifier: GPL-2.0 */
/* bcc chooses between helper generations by this; nothing in splicer does. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
